"""What every model shares: size and frame rules, seeding, the scheduler, and the way from a prompt to frames.

A model's own file says how its pipeline is loaded and called; everything else about a generation is here.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
import transformers
from PIL import Image

from pipelines.adapters import Adapter, Adapters
from pipelines.catalog import (
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_NUM_FRAMES,
    DEFAULT_SEED,
    DEFAULT_SIZE,
    DEFAULT_STEPS,
    ModelSpec,
    Sampler,
)
from pipelines.errors import OutOfMemory

Frames = npt.NDArray[np.uint8]
"""[frames, height, width, 3], RGB."""

OnStep = Callable[[int], None]
"""Called with the number of finished denoising steps. What it raises ends the generation."""


@dataclass(frozen=True)
class Sampling:
    """One video to make, in the field's terms. Sizes in pixels; size and frame count are brought to what the model makes."""

    prompt: str
    negative_prompt: str = ""
    width: int = DEFAULT_SIZE
    height: int = DEFAULT_SIZE
    num_frames: int = DEFAULT_NUM_FRAMES
    num_inference_steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE
    seed: int = DEFAULT_SEED
    control_image: Image.Image | None = None
    sampler: Sampler = "unipc"


class WanModel:
    """One loaded model. Not safe for use from two threads at once."""

    def __init__(self, spec: ModelSpec, pipe: Any, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self._pipe = pipe
        self._pipe.set_progress_bar_config(disable=True)
        self._documented_scheduler = pipe.scheduler.__class__, pipe.scheduler.config
        self._adapters = Adapters(spec, pipe)

    def check_lora(self, adapter: Adapter) -> list[str]:
        """See `Adapters.check`."""
        return self._adapters.check(adapter)

    def apply_loras(self, adapters: Sequence[Adapter]) -> None:
        """See `Adapters.apply`. Raises OutOfMemory too."""
        with self._out_of_memory_as_error():
            self._adapters.apply(adapters)

    def generate(self, sampling: Sampling, on_step: OnStep | None = None) -> Iterator[Frames]:
        """Make one video, yielding its frames as they are decoded.

        The same sampling gives bit-equal frames on the same machine whatever ran before. Nothing is computed before the
        first frames are asked for. Raises OutOfMemory, ValueError (the model needs a control image, or takes none), and
        whatever `on_step` raises.
        """
        sampling = self._fit(sampling)
        with self._out_of_memory_as_error():
            self._pipe.scheduler = self._make_scheduler(sampling.sampler)
            try:
                with torch.no_grad(), _seeded(sampling.seed, self.device) as generator:
                    latents = self._denoise(sampling, generator, _step_end(on_step))
                yield self._decode(latents)
            finally:
                self._pipe.maybe_free_model_hooks()

    def _fit(self, sampling: Sampling) -> Sampling:
        width, height = self.spec.effective_size(sampling.width, sampling.height)
        image = sampling.control_image
        if image is None and self.spec.control_image == "required":
            raise ValueError(f"{self.spec.id} needs a control image")
        if image is not None:
            if self.spec.control_image == "none":
                raise ValueError(f"{self.spec.id} takes no control image")
            image = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        num_frames = self.spec.effective_frames(sampling.num_frames)
        return replace(sampling, width=width, height=height, num_frames=num_frames, control_image=image)

    def _make_scheduler(self, sampler: Sampler) -> Any:
        """A new scheduler for every video, so that no solver state outlives one."""
        if sampler == "flowmatch":
            return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=self.spec.trainer_shift)
        scheduler_class, config = self._documented_scheduler
        return scheduler_class.from_config(config)

    def _call_arguments(self, sampling: Sampling, generator: torch.Generator, on_step_end: Any) -> dict[str, Any]:
        """What every Wan pipeline's `__call__` takes, with the latents as the result."""
        return {
            "prompt": sampling.prompt,
            "negative_prompt": sampling.negative_prompt,
            "width": sampling.width,
            "height": sampling.height,
            "num_frames": sampling.num_frames,
            "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
            "generator": generator,
            "callback_on_step_end": on_step_end,
            "output_type": "latent",
        }

    def _denoise(self, sampling: Sampling, generator: torch.Generator, on_step_end: Any) -> torch.Tensor:
        """Denoised latents [1, C, T, H, W] of `sampling`, whose sizes and control image are already brought to the model."""
        arguments = self._call_arguments(sampling, generator, on_step_end)
        if sampling.control_image is not None:
            arguments["image"] = sampling.control_image
        latents: torch.Tensor = self._pipe(**arguments).frames
        return latents

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> Frames:
        """Latents [1, C, T, H, W] → frames, by the arithmetic of diffusers' pipelines and its PIL output.

        The decoded video is brought to 0..1 in the VAE's dtype and to 0..255 in float32; the other order differs by one
        grey level on a quarter of the values in bf16.
        """
        vae = self._pipe.vae
        latents = latents.to(self.device, vae.dtype)
        mean = torch.tensor(vae.config.latents_mean).view(1, vae.config.z_dim, 1, 1, 1).to(latents)
        inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, vae.config.z_dim, 1, 1, 1).to(latents)
        video = vae.decode(latents / inverse_std + mean, return_dict=False)[0][0]
        video = (video * 0.5 + 0.5).clamp(0, 1).float().mul(255).round().to(torch.uint8)
        frames: Frames = video.permute(1, 2, 3, 0).contiguous().cpu().numpy()
        return frames

    @contextmanager
    def _out_of_memory_as_error(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            # The dead call's frames hold its tensors: without this there is nothing to free yet.
            traceback.clear_frames(error.__traceback__)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise OutOfMemory("the device ran out of memory; ask for fewer frames or a smaller size") from None


def load_part(spec: ModelSpec, name: str, checkpoints: Path, dtype: torch.dtype) -> Any:
    """One component of a pipeline from its own repo, for the models whose parts come from several."""
    source = spec.sources[name]
    options = {"subfolder": source.subfolder, "local_files_only": True}
    if name == "tokenizer":
        return transformers.AutoTokenizer.from_pretrained(checkpoints / source.repo, **options)
    part_class = {
        "transformer": diffusers.WanTransformer3DModel,
        "transformer_2": diffusers.WanTransformer3DModel,
        "vae": diffusers.AutoencoderKLWan,
        "text_encoder": transformers.UMT5EncoderModel,
    }[name]
    return part_class.from_pretrained(checkpoints / source.repo, dtype=dtype, use_safetensors=True, **options)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """The trainer's seeding: the process-wide generators, with the CPU one for the latents.

    First-frame conditioning draws from the process-wide generators after the latents, so a generator of our own would not
    be reproducible. Their state is put back afterwards.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield torch.manual_seed(seed)


def _step_end(on_step: OnStep | None) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    def call(_pipe: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step:
            on_step(step + 1)
        return {}

    return call


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA has a type for it; the CPU allocator raises a bare RuntimeError that only its text tells apart."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
