"""The scheduler of a draft: Euler steps at the timesteps that a distilled LoRA was made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler


class FewStepEuler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc] # diffusers loads it lazily
    """diffusers' own, but with given timesteps in place of evenly spaced ones, and with latents that stay in their dtype.

    Source: LightX2V's WanStepDistillScheduler, whose step is x + (next sigma - sigma) * prediction, in float32.
    """

    def __init__(self, timesteps: Sequence[int], shift: float | None) -> None:
        """`timesteps`: of 1000, before the shift. They are set at once, so that `timesteps` and `sigmas` can be read."""
        super().__init__(num_train_timesteps=1000, shift=shift)
        self._sigmas_before_shift = [timestep / 1000 for timestep in timesteps]
        self.set_timesteps()

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **_: Any) -> None:
        """Raises ValueError for another number of steps than the recipe's."""
        super().set_timesteps(num_inference_steps, device=device, sigmas=self._sigmas_before_shift)

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        # The result has the dtype of the prediction.
        return super().step(model_output.to(sample.dtype), timestep, sample, **options)
