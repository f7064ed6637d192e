"""What a model and a job take of the GPU's memory in each OFFLOAD_MODE, by arithmetic.

    python -m benchmarks.memory

The real code runs on tensors without contents, in bf16 and in the real sizes, and the bytes that are alive at once are
counted. Not in it: what kernels allocate for themselves, CUDA's own share, and what an allocator loses between the pieces.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import real_size, report
from pipelines.catalog import MODELS, OFFLOAD
from pipelines.diffusers_privates import decode_pieces
from pipelines.load import quantization_in
from pipelines.offload import on_device

SIZES = [(832, 480, 41), (832, 480, 81), (1024, 1024, 41), (1280, 720, 81)]
"""Width, height, frames."""


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made in the block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._now = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                size = self._known[storage] = storage.nbytes()
                self._now += size
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._gone, size)
        return result

    def _gone(self, size: int) -> None:
        self._now -= size


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_default_dtype(torch.bfloat16)
    rows: list[dict[str, Any]] = []
    for model_id, spec in MODELS.items():
        sizes = real_size.bytes_of_parts(model_id)
        work = {size: max(denoising(model_id, *size), decoding(model_id, *size)) for size in SIZES}
        needed = on_device(spec, sizes)
        modes = {f"weights {mode}": gigabytes(needed[mode]) if mode in needed else None for mode in OFFLOAD}
        waiting = {mode: sum(sizes.get(part, 0) for part in spec.waits_in_memory(mode)) for mode in needed}
        host = {f"host {mode}": gigabytes(waiting[mode]) if mode in waiting else None for mode in OFFLOAD if mode != "none"}
        jobs = {f"job {'x'.join(map(str, size))}": gigabytes(value) for size, value in work.items()}
        rows.append({"model": model_id, **modes, **host, **jobs})
    report.write("memory", rows, unit="GB, calculated")
    quantized = [{"model": model_id} | dict(_quantized(model_id)) for model_id in MODELS]
    report.write("memory-quantized", quantized, unit="GB, calculated")
    return 0


def _quantized(model_id: str) -> Iterator[tuple[str, float | None]]:
    """The weights with QUANTIZE, by format and mode."""
    spec = MODELS[model_id]
    for format in ("qfloat8", "uint4"):
        needed = on_device(spec, real_size.bytes_of_parts(model_id, quantization_in(spec, format)))
        for mode in ("none", "text_encoder"):
            yield f"{format} {mode}", gigabytes(needed[mode])


def gigabytes(value: int) -> float:
    return round(value / 1e9, 1)


def denoising(model_id: str, width: int, height: int, num_frames: int) -> int:
    """Bytes of a forward pass; as many in every block."""
    config = real_size.TRANSFORMERS[model_id]
    _, channels, *rest = real_size.latents_of(model_id, width, height, num_frames)
    latents = (1, config.get("in_channels", channels), *rest)
    image = {"encoder_hidden_states_image": torch.empty(1, 257, 1280)} if "image_dim" in config else {}
    return _peak(
        lambda: real_size.transformer(model_id, num_layers=2),
        lambda model: model(torch.empty(latents), torch.tensor([500]), torch.empty(1, 512, 4096), **image),
    )


def decoding(model_id: str, width: int, height: int, num_frames: int) -> int:
    """Bytes of a decode by latent frame."""
    latents = real_size.latents_of(model_id, width, height, num_frames)

    def decode(vae: Any) -> None:
        for piece in decode_pieces(vae, torch.empty(latents)):
            del piece

    return _peak(lambda: real_size.vae(model_id), decode)


def _peak(make: Callable[[], Any], run: Callable[[Any], object]) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = make().eval()
        with Alive() as alive:
            run(model)
    return int(alive.peak)


if __name__ == "__main__":
    sys.exit(main())
