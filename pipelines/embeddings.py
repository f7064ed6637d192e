"""A cache of text embeddings, so that a text is encoded once: above all the negative prompt, which hardly ever changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

import torch

from pipelines import diffusers_privates as privates

KEPT = 16
"""Texts, the most recently used. The embedding of one takes 4 MB in bf16: 512 tokens of 4096 numbers."""


def cache_embeddings(pipe: Any, state: Callable[[], Hashable] = lambda: None) -> None:
    """Cache what the pipeline's text encoder makes of a text; the tensors are the same ones.

    `state` tells apart what the text encoder is set to: a text is encoded anew for each.

    diffusers encodes the prompt and the negative prompt in two calls. A pipeline that does it in another way stays as it is.
    """
    if privates.can_cache_embeddings(pipe):
        privates.wrap_embeddings(pipe, lambda encode: _cached(encode, state))


def _cached(encode: Callable[..., torch.Tensor], state: Callable[[], Hashable]) -> Callable[..., torch.Tensor]:
    cached = lru_cache(maxsize=KEPT)(lambda _state, texts, *arguments: encode(list(texts), *arguments))

    def cached_encode(
        prompt: str | list[str],
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = 226,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        texts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        return cached(state(), texts, num_videos_per_prompt, max_sequence_length, device, dtype)

    return cached_encode
