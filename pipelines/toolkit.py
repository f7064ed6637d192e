"""The two files needed of an ai-toolkit checkout, loaded without running its packages' `__init__` files.

An ordinary `import toolkit…` pulls in the trainer: twenty model families and their packages. Here the parent packages are
empty namespaces that only know their folder, so that just the modules named below, and what they import, are run.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pipelines.errors import ToolkitRequired
from pipelines.facts import commit_of

_PIPELINE = "extensions_built_in.diffusion_models.wan22.wan22_pipeline"
_WAN_UTILS = "toolkit.models.wan21.wan_utils"


@dataclass(frozen=True)
class Toolkit:
    """What the worker uses of ai-toolkit."""

    Wan22Pipeline: Any
    """`diffusers.WanPipeline` with conditioning latents and a noise mask."""
    add_first_frame_conditioning: Any
    """14B I2V: latents [1, 16, T, H, W], first frame [1, 3, H, W] in -1..1 → conditioned latents [1, 36, T, H, W]."""
    add_first_frame_conditioning_v22: Any
    """5B: latents [1, 48, T, H, W], first frame in -1..1 → (latents, noise mask [1, 1, T, H, W])."""


def load_toolkit(checkout: Path | None, commit: str | None = None) -> Toolkit:
    """Load what is needed of the checkout at `checkout`, which must be at `commit`, where it knows its own; None: at any.

    Raises ToolkitRequired when there is no checkout, it is at another commit, a file is missing, or an import fails.
    """
    if checkout is None:
        raise ToolkitRequired("this model runs on ai-toolkit: set AI_TOOLKIT_PATH to a checkout of ostris/ai-toolkit")
    missing = [name for name in (_PIPELINE, _WAN_UTILS) if not _file_of(checkout, name).is_file()]
    if missing:
        names = ", ".join(str(_file_of(Path(), name)) for name in missing)
        raise ToolkitRequired(f"the folder at AI_TOOLKIT_PATH is no checkout of ostris/ai-toolkit: it lacks {names}")
    there = commit_of(checkout)
    if commit and there and there != commit:
        raise ToolkitRequired(
            f"the ai-toolkit checkout at AI_TOOLKIT_PATH is at commit {there}, and this worker was tested with {commit}: check "
            f"that out, or set AI_TOOLKIT_COMMIT={there} to run with yours"
        )
    try:
        _prepare_namespaces(checkout)
        pipeline = importlib.import_module(_PIPELINE)
        wan_utils = importlib.import_module(_WAN_UTILS)
        return Toolkit(
            pipeline.Wan22Pipeline, wan_utils.add_first_frame_conditioning, wan_utils.add_first_frame_conditioning_v22
        )
    except Exception as error:  # whatever foreign code can raise while it is imported, a half-written file included
        raise ToolkitRequired(
            f"the ai-toolkit checkout at AI_TOOLKIT_PATH cannot be used ({error}); use the commit the image is built with"
        ) from error


def _file_of(root: Path, module: str) -> Path:
    return root.joinpath(*module.split(".")).with_suffix(".py")


def _prepare_namespaces(checkout: Path) -> None:
    """Put the parent packages into sys.modules as bare namespaces; what another checkout left there goes."""
    if list(getattr(sys.modules.get("toolkit"), "__path__", [])) == [str(checkout / "toolkit")]:
        return
    for loaded in [name for name in sys.modules if name.partition(".")[0] in ("toolkit", "extensions_built_in")]:
        del sys.modules[loaded]
    for name in (_PIPELINE, _WAN_UTILS):
        parts = name.split(".")[:-1]
        for depth in range(1, len(parts) + 1):
            package = ModuleType(".".join(parts[:depth]))
            package.__path__ = [str(checkout.joinpath(*parts[:depth]))]
            sys.modules.setdefault(package.__name__, package)
