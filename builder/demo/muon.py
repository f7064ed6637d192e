"""Muon (Jordan et al., 2024) for matrices and convolutions, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Muon:
    """Steps along the orthogonalised momentum of each matrix. A convolution counts as the matrix [out, in × kernel].

    Matrices of one shape are handled together, which is what makes it quick on a CPU.
    """

    def __init__(
        self, model: nn.Module, is_matrix: Callable[[str, Tensor], bool], rate: float, adam_rate: float, momentum: float
    ):
        self.rate, self.adam_rate, self.momentum = rate, adam_rate, momentum
        self.groups: dict[tuple[int, int], list[Tensor]] = {}
        rest = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if is_matrix(name, parameter):
                self.groups.setdefault((parameter.shape[0], parameter[0].numel()), []).append(parameter)
            else:
                rest.append(parameter)
        self.momenta = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update the parameters with `scale` times the rates."""
        self.adam.param_groups[0]["lr"] = self.adam_rate * scale
        self.adam.step()
        for shape, group in self.groups.items():
            gradient = torch.stack([parameter.grad.flatten(1) for parameter in group if parameter.grad is not None])
            momentum = self.momenta[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonalised(gradient.lerp(momentum, self.momentum))
            size = self.rate * scale * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, direction in zip(group, update, strict=True):
                parameter.mul_(1 - 0.01 * self.rate * scale).add_(direction.view_as(parameter), alpha=-size)

    def state_dict(self) -> dict[str, object]:
        return {"momenta": self.momenta, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.momenta = state["momenta"]  # type: ignore[assignment]
        self.adam.load_state_dict(state["adam"])  # type: ignore[arg-type]


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return the nearest orthogonal matrices [n, rows, columns], about, by five Newton-Schulz steps."""
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x
