"""Text embeddings of recent prompts, so that a text is encoded once: above all the negative one, which hardly ever changes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

KEPT = 16
"""Texts. The embedding of one takes 4 MB in bf16: 512 tokens of 4096 numbers."""


def remember_embeddings(pipe: Any) -> None:
    """Give a Wan pipeline a memory for what its text encoder makes of a text; the tensors are the same ones.

    diffusers encodes the prompt and the negative prompt in two calls of `_get_t5_prompt_embeds`.
    """
    encode = pipe._get_t5_prompt_embeds
    known: OrderedDict[tuple[object, ...], torch.Tensor] = OrderedDict()

    def remembered(
        prompt: str | list[str],
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = 226,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        texts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        key = (texts, num_videos_per_prompt, max_sequence_length, str(device), dtype)
        if key not in known:
            known[key] = encode(prompt, num_videos_per_prompt, max_sequence_length, device, dtype)
        known.move_to_end(key)
        while len(known) > KEPT:
            known.popitem(last=False)
        return known[key]

    pipe._get_t5_prompt_embeds = remembered
