"""Choose the attention kernels of a transformer by the device, and check them against plain arithmetic before the first job.

The kernels differ in the order of their sums, and so in the last bit of a frame: only `native` is what plain diffusers runs.
None here computes in less than the model's own precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from pipelines import diffusers_privates as privates
from pipelines.catalog import Attention
from pipelines.errors import DeviceUnavailable

_BACKENDS: dict[Attention, str] = {"native": "NATIVE", "cudnn": "_NATIVE_CUDNN", "flash": "FLASH", "flash3": "_FLASH_3"}
"""The names of diffusers' backends."""

_HEAD_DIM = 128
"""The width of an attention head in every Wan transformer."""


def set_attention(transformers: Sequence[Any], attention: Attention, device: torch.device) -> None:
    """Run the transformers on these kernels; `auto`: on the first that work of those made for the device.

    The choice depends on the kind of device and on what is installed, not on a race that another worker could end
    differently. Raises DeviceUnavailable when the kernels that are asked for do not work here.
    """
    chosen = _best(device) if attention == "auto" else attention
    if reason := why_not(chosen, device):
        raise DeviceUnavailable(f"ATTENTION={attention} does not work here, {reason}; set ATTENTION to native, or to auto")
    for transformer in transformers:
        transformer.set_attention_backend(privates.attention_backend(_BACKENDS[chosen]).value)


def _best(device: torch.device) -> Attention:
    return next(attention for attention in _candidates(device) if not why_not(attention, device))


def _candidates(device: torch.device) -> Sequence[Attention]:
    """The quickest first, by what the kernels' makers publish for Wan's head width."""
    generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if generation == 9:
        return ("flash3", "cudnn", "native")
    if generation > 9:
        return ("cudnn", "native")
    return ("native",)  # torch's own choice is FlashAttention 2 there


def why_not(attention: Attention, device: torch.device) -> str:
    """Why these kernels cannot be used on the device, or "".

    They can when their error against float32 is at most twice that of torch's own kernels, which `native` is.
    """
    if attention == "native":
        return ""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, tokens, 8, _HEAD_DIM, generator=generator).to(device, dtype) for tokens in (1024, 512, 512)
    )
    exact = _plain(query.float(), key.float(), value.float())
    with torch.no_grad():
        try:
            backends = [privates.attention_backend(_BACKENDS[name]) for name in (attention, "native")]
            privates.check_attention_requirements(backends[0])
            theirs, native = (
                float((dispatch_attention_fn(query, key, value, backend=backend) - exact).abs().max()) for backend in backends
            )
        except Exception as error:  # whatever the kernels of another package can raise
            return str(error).strip().partition("\n")[0] or type(error).__name__
    return "" if theirs <= 2 * native else f"it is off by {theirs:.2g} where torch's own kernels are off by {native:.2g}"


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention by its definition. [1, tokens, heads, width] each, as its result."""
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), value)
