"""Guidance in parallel: the two passes of a denoising step on two devices, with the frames of one device to the bit.

With guidance, a step runs the transformer twice: with the prompt (the conditional pass), then with the negative prompt (the
unconditional pass). Neither needs the other's result. Several processes, called ranks, run the same pipeline on the same
input, each on its own device. The first half of them computes the conditional pass and the second half the unconditional one;
then they exchange the results, and all take the step. Everything else is computed by each, so that the ranks stay equal and
nothing else has to be sent.

With more than two ranks, those of one half split the tokens of their pass among them; see `sequence_parallel`. Without
guidance, all of them split the only pass. Two ranks split no pass, since their frames are those of one, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.device import exchange_errors
from pipelines.errors import DeviceLost, LibraryMoved, RankFailed
from pipelines.sequence_parallel import SequenceParallel

PASSES = 2
"""A step with guidance has two: with the prompt, and with the negative prompt."""

_LONGEST_WAIT = timedelta(minutes=15)
"""How long one rank waits for another, which may have to load or compile first. A rank that ends is noticed at once."""


class CfgParallel:
    """One rank's part. All ranks must make the same videos in the same order."""

    def __init__(self, rank: int, device: torch.device, store: Path, ranks: int = PASSES) -> None:
        """Meet the other ranks; waits for them. `store`: a path of no file yet, the same for all. `ranks`: an even number.

        Raises DeviceLost, and LibraryMoved when more than two ranks cannot work.
        """
        self.ranks = ranks
        per_pass = ranks // PASSES
        self._own_pass = rank // per_pass
        """0: the conditional one; 1: the unconditional one."""
        self._sources = range(0, ranks, per_pass)
        """The rank that sends the result of each pass."""
        is_cuda = device.type == "cuda"
        with exchange_errors():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
                init_method=store.as_uri(),
                rank=rank,
                world_size=ranks,
                timeout=_LONGEST_WAIT,
                device_id=device if is_cuda else None,
            )
            halves = [
                dist.new_group(range(source, source + per_pass), timeout=_LONGEST_WAIT)
                for source in (self._sources if per_pass > 1 else ())
            ]
        self._with_half = SequenceParallel(halves[self._own_pass], self._agree) if halves else None
        self._with_all = SequenceParallel(dist.group.WORLD, self._agree) if halves else None
        self._has_guidance = True
        self._is_over = False
        """Whether the ranks have agreed that this video ends."""
        self._conditional: torch.Tensor | None = None
        """The first result of a step, until the second is there. On a rank that does not compute it, it has no values."""
        self._latents: torch.Tensor | None = None
        """What the step's first pass was given."""

    def shares(self, has_guidance: bool) -> bool:
        """Whether the ranks have something to share in a video."""
        return has_guidance or self._with_all is not None

    @contextmanager
    def one_video(self, transformers: Sequence[torch.nn.Module], has_guidance: bool = True) -> Iterator[None]:
        """Share the passes of these transformers while the block denoises one video.

        An error on one rank ends the block on all, within a step: here as what it is, there as RankFailed. Raises DeviceLost
        when another rank is gone. The process must end then, since other ranks may wait for this one.
        """
        self._is_over, self._conditional, self._has_guidance = False, None, has_guidance
        try:
            with _calls_of(transformers, self._pass):
                yield
        except DeviceLost:
            raise
        except BaseException:
            if not self._is_over:
                self._agree(can_go_on=False)
            raise
        self._agree()

    def _pass(self, transformer: Any, latents: torch.Tensor, compute: Callable[[], Any]) -> tuple[torch.Tensor]:
        """One pass: with guidance the conditional one, then the unconditional one of the same latents."""
        if not self._has_guidance:
            result = _computed(self._with_all, transformer, latents, compute)
            self._agree()
            return (result,)
        if self._conditional is None:
            self._latents = latents
            if self._own_pass == 0:
                self._conditional = _computed(self._with_half, transformer, latents, compute)
            else:
                self._conditional = _without_values(transformer, latents)
            return (self._conditional,)
        if latents is not self._latents:
            raise LibraryMoved("the pipeline does not run the two passes of a step in turn; set GPUS=1")
        conditional, self._conditional = self._conditional, None
        if self._own_pass == 1:
            unconditional = _computed(self._with_half, transformer, latents, compute)
        else:
            unconditional = torch.empty_like(conditional)
        if unconditional.shape != conditional.shape or unconditional.dtype != conditional.dtype:
            raise LibraryMoved("the transformer's result has another shape or dtype than expected; set GPUS=1")
        self._agree()
        with exchange_errors():
            for source, tensor in zip(self._sources, (conditional, unconditional), strict=True):
                _broadcast(tensor, source)
        return (unconditional,)

    def _agree(self, can_go_on: bool = True) -> None:
        """Wait for all ranks, and learn whether all can go on.

        Raises RankFailed when this one can and another cannot, and DeviceLost.
        """
        failures = torch.tensor([not can_go_on], dtype=torch.int32)
        with exchange_errors():
            dist.all_reduce(failures)
        if failures.item():
            self._is_over = True
            if can_go_on:
                raise RankFailed("another GPU of this worker could not go on")


def _computed(
    parallel: SequenceParallel | None, transformer: Any, latents: torch.Tensor, compute: Callable[[], Any]
) -> torch.Tensor:
    """The result of a pass, whose tokens are split among the ranks of `parallel`; None: this rank computes all of it."""
    with parallel.split(transformer, latents) if parallel else nullcontext():
        result: torch.Tensor = compute()[0]
    return result


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
def _calls_of(models: Sequence[torch.nn.Module], instead: Callable[..., Any]) -> Iterator[None]:
    """Have `instead(model, hidden_states, compute)` run when one of these models is called.

    Their class is changed, and not their `forward`: hooks of offloading replace that, even within a pass.
    """
    before: dict[Any, Callable[..., Any]] = {type(model): type(model).__call__ for model in models}
    try:
        for of_models, plain in before.items():
            of_models.__call__ = _calling(instead, set(map(id, models)), plain)
        yield
    finally:
        for of_models, plain in before.items():
            of_models.__call__ = plain


def _calling(instead: Callable[..., Any], shared: set[int], plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(model: Any, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> Any:
        compute = partial(plain, model, hidden_states, *rest, **named)
        return instead(model, hidden_states, compute) if id(model) in shared else compute()

    return call
