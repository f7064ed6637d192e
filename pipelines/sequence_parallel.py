"""One pass of a transformer on several devices, each with a part of the video's tokens. This is known as Ulysses.

Every layer but the self-attention works on each token by itself, so a rank runs it on its own tokens only. For the
self-attention, the ranks exchange tokens for heads: each gets all tokens of some heads, attends with the kernels that one
device would use, and gives the results back. The output is gathered, so that every rank has the whole of it.

A matrix product of fewer rows may be rounded in another way, so the last bit of a frame can differ from that of one device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from pipelines import diffusers_privates as privates
from pipelines.device import exchange_errors
from pipelines.errors import LibraryMoved


class SequenceParallel:
    """This rank's part in a group of ranks, which run the same passes in the same order."""

    def __init__(self, group: Any, agree: Callable[[], None]) -> None:
        """`agree`: called before each exchange; raises when a rank cannot take part in it. Raises LibraryMoved."""
        privates.check_self_attention()
        self._group = group
        self._agree = agree
        self._ranks: int = dist.get_world_size(group)
        self._rank = dist.get_rank(group)
        self._tokens: list[int] = []
        """How many tokens each rank has in this pass."""
        self._heads: list[int] = []
        """How many heads each rank has in an attention."""
        self._attentions = 0
        self._uncompiled: Callable[..., torch.Tensor] = torch.compiler.disable(self._attend)  # type: ignore[no-untyped-call]

    @contextmanager
    def split(self, transformer: Any, latents: torch.Tensor) -> Iterator[None]:
        """Within the block, have a pass of `transformer` on `latents` [1, C, T, H, W] compute only this rank's tokens.

        The pass returns the whole result. With fewer tokens or heads than ranks, every rank computes all of it. Raises
        LibraryMoved, and what `agree` raises.
        """
        sizes, patches, heads = latents.shape[2:], transformer.config.patch_size, transformer.config.num_attention_heads
        tokens = math.prod(size // patch for size, patch in zip(sizes, patches, strict=True))
        if min(tokens, heads) < self._ranks:
            yield
            return
        self._tokens, self._heads, self._attentions = _shares(tokens, self._ranks), _shares(heads, self._ranks), 0
        begin = sum(self._tokens[: self._rank])
        mine = slice(begin, begin + self._tokens[self._rank])
        with ExitStack() as hooks:
            for module, change in (
                # The transformer flattens the last three dimensions.
                (transformer.patch_embedding, lambda output: output.flatten(2)[:, :, mine, None, None]),
                (transformer.rope, lambda tables: tuple(table[:, mine] for table in tables)),
                (transformer.condition_embedder, lambda outputs: (*(_part(time, mine) for time in outputs[:2]), *outputs[2:])),
                (transformer.proj_out, self._gathered),
            ):
                hooks.callback(module.register_forward_hook(_changing(change)).remove)
            with privates.self_attention_by(transformer, self._uncompiled):
                yield
        if self._attentions != len(transformer.blocks):
            raise LibraryMoved("the transformer does not run one self-attention in each block; set GPUS=2")

    def _attend(self, attend: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """Return `attend(query, key, value)`. All are [1, this rank's tokens, heads, width]."""
        self._attentions += 1
        return self._tokens_of_all_heads(attend(*map(self._heads_of_all_tokens, inputs)))

    def _heads_of_all_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """[1, this rank's tokens, all heads, width] → [1, all tokens, this rank's heads, width]."""
        heads, width = self._heads[self._rank], values.shape[-1]
        parts = [part.flatten() for part in torch.split(values, self._heads, dim=2)]
        received = self._exchange(torch.cat(parts), list(map(len, parts)), [count * heads * width for count in self._tokens])
        return received.view(1, -1, heads, width)

    def _tokens_of_all_heads(self, values: torch.Tensor) -> torch.Tensor:
        """[1, all tokens, this rank's heads, width] → [1, this rank's tokens, all heads, width]."""
        tokens, (heads, width) = self._tokens[self._rank], values.shape[2:]
        counts = [tokens * count * width for count in self._heads]
        received = self._exchange(values.flatten(), [count * heads * width for count in self._tokens], counts)
        return torch.cat([part.view(1, tokens, -1, width) for part in torch.split(received, counts)], dim=2)

    def _gathered(self, output: torch.Tensor) -> torch.Tensor:
        """[1, this rank's tokens, channels] → [1, all tokens, channels]."""
        if output.shape[1] != self._tokens[self._rank]:
            raise LibraryMoved("the transformer has other tokens than expected; set GPUS=2")
        channels = output.shape[-1]
        sent = output.flatten().repeat(self._ranks)
        received = self._exchange(sent, [output.numel()] * self._ranks, [count * channels for count in self._tokens])
        return received.view(1, -1, channels)

    def _exchange(self, sent: torch.Tensor, to_each: Sequence[int], from_each: Sequence[int]) -> torch.Tensor:
        """Send a part of the flat tensor to each rank of the group, and receive one from each, as bytes."""
        received = sent.new_empty(sum(from_each))
        self._agree()
        with exchange_errors():
            dist.all_to_all_single(
                received.view(torch.uint8),
                sent.view(torch.uint8),
                [count * sent.itemsize for count in from_each],
                [count * sent.itemsize for count in to_each],
                self._group,
            )
        return received


def _shares(total: int, ranks: int) -> list[int]:
    return [total // ranks + (rank < total % ranks) for rank in range(ranks)]


def _part(time: torch.Tensor, mine: slice) -> torch.Tensor:
    """The time embeddings of this rank's tokens [1, tokens, n], or the one for the whole video [1, n]."""
    return time[:, mine] if time.ndim == 3 else time


def _changing(change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda _module, _inputs, output: change(output)
