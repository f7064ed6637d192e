"""The Wan models: torch and diffusers, and nothing of jobs, HTTP or buckets.

    from pipelines import Adapter, Sampling, load_pipeline
    from pipelines.lora.file import LoraFile

    pipeline = load_pipeline("wan21_1b", checkpoints=Path("/checkpoints"), device="cuda")
    pipeline.apply_loras([Adapter(LoraFile.read(path), scale=1.0)])
    for frames in pipeline.generate(Sampling(prompt="a boat", seed=42)):  # uint8 [n, height, width, 3]
        ...

`catalog`, `checkpoints`, `errors`, `lora.file`, `recipes` and `weights` import no torch, so that the worker can check a job
before anything heavy is loaded. The names above are imported on first use, for the same reason.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.base import WanModel
    from pipelines.load import load_pipeline
    from pipelines.lora.file import Adapter
    from pipelines.recipes import Sampling

__all__ = ["Adapter", "Sampling", "WanModel", "load_pipeline"]

_HOME = {"Adapter": "lora.file", "Sampling": "recipes", "WanModel": "base", "load_pipeline": "load"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
