"""Guidance in parallel: the two passes of a denoising step on two devices, with the frames of one device to the bit.

With guidance, a step runs the transformer twice: with the prompt (the conditional pass), then with the negative prompt (the
unconditional pass). Neither needs the other's result. Two processes, called ranks, run the same pipeline on the same input,
each on its own device. Rank 0 computes the conditional pass and rank 1 the unconditional one; then they exchange the results,
and both take the step. Everything else is computed twice, so that the ranks stay equal and nothing else has to be sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.errors import DeviceLost, LibraryMoved, PipelineError, RankFailed

RANKS = 2
"""A step has two passes."""

_LONGEST_WAIT = timedelta(minutes=15)
"""How long one rank waits for another, which may have to load or compile first. A rank that ends is noticed at once."""


class CfgParallel:
    """One rank's part. Both ranks must make the same videos in the same order."""

    def __init__(self, rank: int, device: torch.device, store: Path) -> None:
        """Meet the other rank; waits for it. `store`: a path of no file yet, the same for both. Raises DeviceLost."""
        self.rank = rank
        is_cuda = device.type == "cuda"
        with _lost_with_the_other_rank():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
                init_method=store.as_uri(),
                rank=rank,
                world_size=RANKS,
                timeout=_LONGEST_WAIT,
                device_id=device if is_cuda else None,
            )
        self._is_over = False
        """Whether the ranks have agreed that this video ends."""
        self._conditional: torch.Tensor | None = None
        """The first result of a step, until the second is there. On rank 1 it has no values until then."""
        self._latents: torch.Tensor | None = None
        """What the step's first pass was given."""

    @contextmanager
    def one_video(self, transformers: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Share the passes of these transformers while the block denoises one video with guidance.

        An error on one rank ends the block on both, within a step: here as what it is, there as RankFailed. Raises DeviceLost
        when the other rank is gone.
        """
        self._is_over, self._conditional = False, None
        try:
            with _forward_of(transformers, self._pass):
                yield
        except BaseException:
            if not self._is_over:
                with suppress(PipelineError):
                    self._agree(can_go_on=False)
            raise
        self._agree(can_go_on=True)

    def _pass(self, transformer: Any, latents: torch.Tensor, compute: Callable[[], Any]) -> tuple[torch.Tensor]:
        """One pass: the conditional one, then the unconditional one of the same latents."""
        if self._conditional is None:
            self._latents = latents
            self._conditional = compute()[0] if self.rank == 0 else _without_values(transformer, latents)
            return (self._conditional,)
        if latents is not self._latents:
            raise LibraryMoved("the pipeline does not run the two passes of a step in turn; set GPUS=1")
        conditional, self._conditional = self._conditional, None
        unconditional = compute()[0] if self.rank == 1 else torch.empty_like(conditional)
        if unconditional.shape != conditional.shape or unconditional.dtype != conditional.dtype:
            raise LibraryMoved("the transformer's result has another shape or dtype than expected; set GPUS=1")
        self._agree(can_go_on=True)
        with _lost_with_the_other_rank():
            for source, tensor in enumerate((conditional, unconditional)):
                _broadcast(tensor, source)
        return (unconditional,)

    def _agree(self, can_go_on: bool) -> None:
        """Wait for the other rank, and learn whether both can go on. Raises RankFailed if only this one can, and DeviceLost."""
        failures = torch.tensor([not can_go_on], dtype=torch.int32)
        try:
            with _lost_with_the_other_rank():
                dist.all_reduce(failures)
        except DeviceLost:
            self._is_over = True
            raise
        if failures.item():
            self._is_over = True
            if can_go_on:
                raise RankFailed("another GPU of this worker could not go on")


def _broadcast(tensor: torch.Tensor, source: int) -> None:
    """Fill `tensor` on every rank with that of rank `source`, as bytes: no backend changes them, whatever the dtype."""
    values = tensor.contiguous()
    dist.broadcast(values.view(torch.uint8), source)
    if values is not tensor:
        tensor.copy_(values)


def _without_values(transformer: Any, latents: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape and dtype of the transformer's result [1, C, T, H, W]."""
    batch, _, *sizes = latents.shape
    return latents.new_empty(batch, transformer.config.out_channels, *sizes, dtype=transformer.dtype)


@contextmanager
def _forward_of(models: Sequence[torch.nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Have `call(model, hidden_states, compute)` run instead of each model's `forward`, whatever hooks it has by then."""
    distinct: list[Any] = list({id(model): model for model in models}.values())
    before = [(model, vars(model).get("forward")) for model in distinct]
    try:
        for model in distinct:
            model.forward = _calling(call, model, model.forward)
        yield
    finally:
        for model, forward in before:
            if forward is None:
                del model.forward
            else:
                model.forward = forward


def _calling(call: Callable[..., Any], model: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda hidden_states, *rest, **named: call(model, hidden_states, partial(forward, hidden_states, *rest, **named))


@contextmanager
def _lost_with_the_other_rank() -> Iterator[None]:
    """torch says with a RuntimeError that a connection ended or that nothing came in time."""
    try:
        yield
    except RuntimeError as error:
        raise DeviceLost("another GPU's process ended, or is silent; if this happens at every start, set GPUS=1") from error
