"""What a model and a job take of the GPU's memory in each OFFLOAD_MODE, by arithmetic and as it is measured.

    python -m benchmarks.memory
    python -m benchmarks.memory --measure --size 14B     needs a GPU: one video of two steps in each mode that fits

`--measure` puts what torch allocated at most beside the arithmetic, with random weights of the real size, a VAE of the real
size, a tiny text encoder and no LoRA. Without a GPU it prints the arithmetic alone.

By arithmetic: the real code runs on tensors without contents, in bf16 and in the real sizes, and the bytes that are alive at
once are counted. Not in it: what kernels allocate for themselves, CUDA's own share, and what an allocator loses between the
pieces.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import real_size, report
from benchmarks.switch import SIZES, arguments, in_a_folder, write_real_size, write_vae
from builder import tiny_checkpoints
from pipelines import Sampling, load_pipeline
from pipelines.catalog import MODELS, OFFLOAD, ModelSpec, OffloadMode
from pipelines.checkpoints import Checkpoints
from pipelines.diffusers_privates import decode_pieces
from pipelines.errors import DeviceUnavailable, OutOfMemory
from pipelines.offload import bytes_by_mode, on_device
from pipelines.trained import quantization_in

VIDEOS = [(832, 480, 41), (832, 480, 81), (1024, 1024, 41), (1280, 720, 81)]
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
    parser = arguments("python -m benchmarks.memory", __doc__, repeat=1)
    parser.add_argument("--measure", action="store_true", help="measure, in place of the tables by arithmetic")
    for name, default in (("width", 832), ("height", 480), ("num-frames", 81)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if options.measure:
        video = (options.width, options.height, options.num_frames)
        in_a_folder(lambda folder: measure(folder, options.size, options.blocks, video))
    else:
        calculate()
    return 0


def calculate() -> None:
    torch.set_default_dtype(torch.bfloat16)
    rows: list[dict[str, Any]] = []
    for model_id, spec in MODELS.items():
        sizes = real_size.bytes_of_parts(model_id)
        work = {size: max(denoising(model_id, *size), decoding(model_id, *size)) for size in VIDEOS}
        needed = on_device(spec, sizes, real_size.bytes_outside_blocks(model_id))
        modes = {f"weights {mode}": gigabytes(needed[mode]) if mode in needed else None for mode in OFFLOAD}
        waiting = {mode: sum(sizes.get(part, 0) for part in spec.waits_in_memory(mode)) for mode in needed}
        host = {f"host {mode}": gigabytes(waiting[mode]) if mode in waiting else None for mode in OFFLOAD if mode != "none"}
        jobs = {f"job {'x'.join(map(str, size))}": gigabytes(value) for size, value in work.items()}
        rows.append({"model": model_id, **modes, **host, **jobs})
    report.write("memory", rows, unit="GB, calculated")
    quantized = [{"model": model_id} | dict(_quantized(model_id)) for model_id in MODELS]
    report.write("memory-quantized", quantized, unit="GB, calculated")


def measure(root: Path, size: str, blocks: int | None, video: tuple[int, int, int]) -> None:
    spec = MODELS["wan21_14b" if size == "14B" else "wan21_1b"]
    repo = root / spec.sources["vae"].repo
    tiny_checkpoints.write_checkpoints(root)
    if size in SIZES:
        write_real_size(repo / "transformer", size, blocks)
        write_vae(repo / "vae", spec.id)
    torch.set_default_dtype(torch.bfloat16)
    job = max(denoising(spec.id, *video), decoding(spec.id, *video))
    torch.set_default_dtype(torch.float32)
    weights = bytes_by_mode(Checkpoints(spec, root), torch.bfloat16.itemsize)
    shape = "x".join(map(str, video))
    rows = report.Rows(f"memory-measured-{size}", size=size, blocks=blocks, video=shape, unit="GB")
    for mode in spec.offload_modes:
        facts = {"mode": mode, "weights_by_arithmetic": gigabytes(weights[mode].device), "job_by_arithmetic": gigabytes(job)}
        try:
            rows.add(**facts, **(measured(spec, root, mode, video) if torch.cuda.is_available() else {}))
        except (DeviceUnavailable, OutOfMemory) as error:
            rows.add(**facts, error=str(error))


def measured(spec: ModelSpec, root: Path, mode: OffloadMode, video: tuple[int, int, int]) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    with report.Peak() as load:
        model = load_pipeline(spec.id, root, "cuda", mode)
    there = torch.cuda.memory_allocated()
    with report.Peak() as job:
        for _ in model.generate(Sampling("a boat", "", *video, num_inference_steps=2, seed=42)):
            pass
    return {
        "weights_between_videos": gigabytes(there),
        "peak_of_the_load": load.total_gigabytes,
        "peak_of_the_job": job.total_gigabytes,
        "reserved": gigabytes(torch.cuda.memory_reserved()),
    }


def _quantized(model_id: str) -> Iterator[tuple[str, float | None]]:
    """The weights with QUANTIZE, by format and mode."""
    spec = MODELS[model_id]
    for format in ("qfloat8", "uint4"):
        quantization = quantization_in(spec, format)
        sizes = real_size.bytes_of_parts(model_id, quantization)
        needed = on_device(spec, sizes, real_size.bytes_outside_blocks(model_id, quantization))
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
