"""The provenance of a loaded model, for the `settings` of a result: versions, revisions, dtype, device. No path, no secret."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import torch

from pipelines import diffusers_privates as privates
from pipelines.checkpoints import Checkpoints

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def facts_of(checkpoints: Checkpoints, toolkit: Path | None, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that decides the frames and is the same for all jobs of a worker."""
    spec = checkpoints.spec
    facts: dict[str, Any] = {
        "model": spec.id,
        "checkpoints": checkpoints.revisions(),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "gpus": 1,
        "attention": privates.active_attention(),
        "compiled": False,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    if spec.needs_toolkit and toolkit is not None:
        facts["ai_toolkit"] = {"version": toolkit_version(toolkit), "commit": commit_of(toolkit)}
    return facts


def toolkit_version(checkout: Path) -> str | None:
    """`VERSION` of the checkout's version.py."""
    file = checkout / "version.py"
    match = re.search(r'VERSION\s*=\s*"([^"]+)"', _text(file))
    return match[1] if match else None


def commit_of(checkout: Path) -> str | None:
    """The checked-out commit, read from git's own files, since an image need not have git."""
    git = checkout / ".git"
    head = _text(git / "HEAD")
    if head.startswith("ref: "):
        reference = head.removeprefix("ref: ").strip()
        packed = re.search(rf"^([0-9a-f]{{40}}) {re.escape(reference)}$", _text(git / "packed-refs"), re.MULTILINE)
        head = _text(git / reference) or (packed[1] if packed else "")
    match = _COMMIT.match(head)
    return match[0] if match else None


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""
