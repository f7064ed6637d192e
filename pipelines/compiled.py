"""`torch.compile` for the blocks of a transformer, each compiled once for all of them, with caches that outlive the process.

Compiled code computes in another order than plain diffusers, and so differs in the last bit of a frame.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from pipelines import diffusers_privates as privates
from pipelines.errors import DeviceUnavailable

VARIANTS = 32
"""How many versions of a block may be kept: for a first size and any size, with a LoRA and without, and larger ranks.

torch's own limit of 8 ends in running uncompiled.
"""


def compile_blocks(
    transformers: Sequence[Any],
    device: torch.device,
    cache_dir: Path | None = None,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Have the repeated blocks compiled when they first run, in seconds rather than the minutes of a whole model.

    `cache_dir`: where compiled code is kept for other processes on the same kind of device. Raises DeviceUnavailable when
    nothing can be compiled here.
    """
    if cache_dir is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir)  # read when something is compiled; Triton's cache lies below it
    with compiler_settings():  # are they there?
        pass
    if backend == "inductor" and (reason := _why_nothing_compiles(device)):
        raise DeviceUnavailable(
            f"COMPILE=1, but nothing can be compiled here ({reason}): install a C++ compiler, or set COMPILE=0"
        )
    for transformer in transformers:
        transformer.rope.register_forward_hook(_clone_all)
        transformer.requires_grad_(False)  # as peft leaves them with the first LoRA, for which all would be compiled again
        transformer.compile_repeated_blocks(backend=backend)


def compiler_settings() -> AbstractContextManager[None]:
    """Within it, blocks are compiled as often as they need, and one that cannot be compiled runs as it is; the log says so.

    torch keeps these settings by thread: set in one thread, they are not those of another.
    """
    return privates.compiler_settings(recompile_limit=VARIANTS, suppress_errors=True)


def _clone_all(_module: torch.nn.Module, _inputs: Any, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """RoPE's tables are views, and code would be compiled for the sizes of what they are views of."""
    return tuple(table.clone() for table in outputs)


def _why_nothing_compiles(device: torch.device) -> str:
    """Compiles a sum, for which the same tools are needed as for a block."""
    with privates.compiler_settings(suppress_errors=False):
        try:
            torch.compile(lambda numbers: (numbers * 2 + 1).sum())(torch.ones(8, device=device))
        except Exception as error:  # whatever a compiler can raise
            return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""
