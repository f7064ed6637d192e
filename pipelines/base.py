"""What all models share: the way from a prompt to frames, and the seeding.

A family's own module says how its pipeline is put together and called.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from PIL import Image, ImageOps

from pipelines.catalog import OFFLOAD, LoraMode, OffloadMode
from pipelines.cfg_parallel import CfgParallel
from pipelines.compiled import compile_blocks, compiler_settings
from pipelines.decode import Decoder, Frames
from pipelines.device import device_errors
from pipelines.embeddings import cache_embeddings
from pipelines.errors import DeviceUnavailable, LoraInvalid, blamed_on
from pipelines.image_processor import TensorImageProcessor
from pipelines.lora.applied import AppliedLoras
from pipelines.lora.file import Adapter
from pipelines.offload import place, refresh
from pipelines.parts import Parts
from pipelines.recipes import Recipe, Sampling, documented
from pipelines.schedulers import Schedulers
from pipelines.toolkit import Toolkit
from pipelines.trained import Quantization

OnStep = Callable[[int], None]
"""Called with the number of finished denoising steps. What it raises ends the generation."""


_NOT_ARGUMENTS = {"seed", "guidance_scale_2", "image_fit", "control_image", "last_image"}
"""Fields of Sampling that not every pipeline takes as they are."""


def fit_image(image: Image.Image, sampling: Sampling) -> Image.Image:
    """The image as RGB, resized with LANCZOS to exactly the size of `sampling`, by its `image_fit`."""
    image, size = image.convert("RGB"), (sampling.width, sampling.height)
    if sampling.image_fit == "crop":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    if sampling.image_fit == "pad":
        return ImageOps.pad(image, size, Image.Resampling.LANCZOS)
    return image.resize(size, Image.Resampling.LANCZOS)


class WanModel(ABC):
    """One loaded model. Not safe for use from two threads at once."""

    @classmethod
    @abstractmethod
    def load(cls, parts: Parts, toolkit: Toolkit | None) -> WanModel:
        """Put the model's pipeline together. `toolkit`: for the families that need it."""

    def __init__(self, pipe: Any, parts: Parts) -> None:
        self.spec = spec = parts.spec
        self._offloading: AbstractContextManager[None] = contextlib.nullcontext()
        self._parallel: CfgParallel | None = None
        self.facts: dict[str, Any] = {}
        """See `facts_of`."""
        self.bytes_by_mode: dict[OffloadMode, int] = {}
        """Weights on the device in each offload mode; empty on a CPU."""
        self.device = parts.device
        self._pipe = pipe
        self._pipe.set_progress_bar_config(disable=True)
        self.schedulers = Schedulers(spec, pipe)
        self.loras = AppliedLoras(spec, pipe, parts.checkpoints, parts.device, parts.quantization)
        self._decoder = Decoder(pipe.vae, parts.device, self._rest_of_the_model)
        self._image_processor = getattr(pipe, "image_processor", None)
        self._text_attention = "sdpa"
        cache_embeddings(pipe, lambda: (self._text_attention, self.loras.rounding_of_text_encoder))

    def place(self, mode: OffloadMode) -> None:
        """Set up the offloading of `mode`, once."""
        self._offloading = place(self._pipe, self.device, mode)
        self.facts["offload_mode"] = self.loras.offload_mode = mode

    def compile_blocks(self, cache_dir: Path | None = None, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the transformers' blocks, before the first LoRA is applied; see `compiled.compile_blocks`."""
        if not OFFLOAD[mode := self.facts["offload_mode"]].can_compile:
            raise DeviceUnavailable(f"COMPILE=1 does not work with OFFLOAD_MODE={mode}, which this GPU needs; set COMPILE=0")
        compile_blocks([getattr(self._pipe, name) for name in self.spec.transformers], self.device, cache_dir, backend)
        self.loras.are_compiled = True
        self.facts["compiled"] = True

    def share_passes(self, parallel: CfgParallel) -> None:
        """From now on compute only this rank's part of each video in which it has one."""
        self._parallel = parallel
        self.facts["gpus"] = parallel.ranks

    def check_equal(self, facts: dict[str, Any]) -> None:
        """Raises DeviceUnavailable when this rank would compute otherwise than another, which has these facts.

        How the weights wait in memory may differ.
        """
        names = sorted(self.facts.keys() - {"offload_mode"})
        if differing := [f"{name} {self.facts[name]} and {facts[name]}" for name in names if self.facts[name] != facts[name]]:
            raise DeviceUnavailable(
                f"the GPUs of this worker would compute differently: {', '.join(differing)}; set these instead of `auto`, or "
                "set GPUS=1"
            )

    def apply_loras(
        self,
        adapters: Sequence[Adapter],
        mode: LoraMode = "adapter",
        quantization: Quantization | None = None,
        recovery: Adapter | None = None,
    ) -> None:
        """Make the model carry exactly these LoRAs at these scales; what is applied already stays.

        A transformer takes one LoRA that is not extra, and any number of extra ones on top, in their order.

        `quantization`: how the weights are rounded, as in a quantized training; `recovery`: the accuracy recovery adapter that
        lies beneath the LoRAs there. With them, LoRAs are carried `beside`. A model whose weights are kept as codes has both as
        they are.

        Raises LoraError with its `position`, OutOfMemory, DeviceLost; every transformer is plain then.
        """
        for position, adapter in enumerate(adapters):
            with blamed_on(position):
                adapter.file.check_unchanged()
        try:
            with self._device_errors():
                self.loras.apply(adapters, mode, quantization, recovery)
        except BaseException:
            with self._device_errors():  # a dead device must not hide behind the error of this clean-up
                self.loras.drop_all()
            raise

    def generate(
        self, sampling: Sampling, recipe: Recipe | None = None, on_step: OnStep | None = None
    ) -> Generator[Frames, None, None]:
        """Make one video, by default as the model page says, yielding its frames as they are decoded.

        The same arguments give bit-equal frames on the same machine whatever ran before. Nothing is computed before the
        first frames are asked for. Raises OutOfMemory, DeviceLost, ValueError (the model needs a control image, or takes
        none), LoraInvalid (its values are too large), and whatever `on_step` raises.
        """
        recipe = recipe or documented(self.spec)
        with self._device_errors():
            try:
                latents = self._latents(sampling, recipe, on_step)
                self._check_finite(latents)
                yield from self._decoder.frames_of(latents, recipe.decodes_in_tiles)
            finally:
                self._pipe.maybe_free_model_hooks()

    def shares(self, sampling: Sampling, recipe: Recipe) -> bool:
        """Whether the other ranks must `denoise` this video while this one runs `generate`."""
        return self._parallel is not None and self._parallel.shares(_has_guidance(sampling, recipe))

    def denoise(self, sampling: Sampling, recipe: Recipe) -> None:
        """What a rank other than 0 does for a video. Raises what `generate` raises, and RankFailed."""
        with self._device_errors():
            try:
                self._latents(sampling, recipe, None)
            finally:
                self._pipe.maybe_free_model_hooks()

    def _latents(self, sampling: Sampling, recipe: Recipe, on_step: OnStep | None) -> torch.Tensor:
        transformers = [getattr(self._pipe, name) for name in self.spec.transformers]
        sharing: Any = contextlib.nullcontext()
        if self._parallel and self.shares(sampling, recipe):
            sharing = self._parallel.one_video(transformers, _has_guidance(sampling, recipe))
        with sharing:  # from here on, what fails on this rank ends the video on all
            sampling = self._fit(sampling, recipe)
            self._apply_recipe(recipe)
            with torch.no_grad(), self._offloading, self._compiled(), _seeded(sampling.seed, self.device) as generator:
                return self._denoise(sampling, generator, _step_end(on_step))

    def _check_finite(self, latents: torch.Tensor) -> None:
        """Raises LoraInvalid for latents that would be black frames."""
        if not bool(latents.isfinite().all()):
            raise LoraInvalid(
                "the video came out as numbers that are not finite: the LoRA's values are too large; lower its "
                "network_multiplier, or use an earlier save"
            )

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        """Have blocks compiled within, where they are to be."""
        if not self.loras.are_compiled:
            yield
        elif self.loras.need_eager_code:
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            with compiler_settings():
                yield

    def tokens_of(self, prompt: str) -> int:
        """How many tokens the text encoder would need for a prompt. It reads MAX_TOKENS, and cuts off the rest."""
        return len(self._pipe.tokenizer(prompt_clean(prompt), add_special_tokens=True)["input_ids"])

    def _apply_recipe(self, recipe: Recipe) -> None:
        self._pipe.scheduler = copy.deepcopy(self.schedulers.of(recipe))
        self._pipe.register_to_config(boundary_ratio=self.schedulers.boundary_ratio_of(recipe))
        if recipe.text_attention != self._text_attention:
            self._pipe.text_encoder.set_attn_implementation(recipe.text_attention)
            self._text_attention = recipe.text_attention
        if self._image_processor is not None:
            own = self._image_processor
            self._pipe.image_processor = TensorImageProcessor(own) if recipe.image_resize == "torch" else own
        self.loras.cast_as_trainer(recipe.trainer_dtypes)

    def _fit(self, sampling: Sampling, recipe: Recipe) -> Sampling:
        """`sampling` as the model makes it. Raises ValueError when the control image is missing or not taken."""
        sampling = recipe.fit(sampling)
        if sampling.control_image is None and self.spec.control_image == "required":
            raise ValueError(f"{self.spec.id} needs a control image")
        if sampling.control_image is not None and self.spec.control_image == "none":
            raise ValueError(f"{self.spec.id} takes no control image")
        if sampling.last_image is not None and not self.spec.takes_last_image:
            raise ValueError(f"{self.spec.id} takes no last image")
        control_image, last_image = (
            image and fit_image(image, sampling) for image in (sampling.control_image, sampling.last_image)
        )
        return replace(sampling, control_image=control_image, last_image=last_image)

    def _call_arguments(self, sampling: Sampling, generator: torch.Generator, on_step_end: Any) -> dict[str, Any]:
        """What every Wan pipeline's `__call__` takes, with the latents as the result."""
        names = {field.name for field in fields(sampling)} - _NOT_ARGUMENTS
        guidance_2 = {} if sampling.guidance_scale_2 is None else {"guidance_scale_2": sampling.guidance_scale_2}
        return {
            **{name: getattr(sampling, name) for name in names},
            **guidance_2,
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

    def _rest_of_the_model(self) -> list[torch.nn.Module]:
        """What a decode does not need and another memory could hold."""
        if self.device.type == "cpu":
            return []
        names = ("text_encoder", "image_encoder", "transformer", "transformer_2")
        waiting = self.spec.waits_in_memory(self.facts["offload_mode"])
        parts = [getattr(self._pipe, name, None) for name in names if name not in waiting]
        return list({id(part): part for part in parts if part is not None}.values())

    def _device_errors(self) -> AbstractContextManager[None]:
        moved = ("text_encoder", *self.spec.transformers)
        return device_errors(self.device, lambda: refresh(self._pipe, moved), self._memory_remedy)

    def _memory_remedy(self) -> str:
        """What the operator can change: an offload mode with fewer weights on the device, where there is one for this model."""
        if self.device.type == "cpu":
            return "run the worker on a machine with more memory"
        now = self.bytes_by_mode[self.facts["offload_mode"]]
        for mode in self.spec.offload_modes:
            can_be_used = (OFFLOAD[mode].can_merge or not self.loras.are_merged) and (
                OFFLOAD[mode].can_compile or not self.facts["compiled"]
            )
            if self.bytes_by_mode[mode] < now and can_be_used:
                return f"run the worker with OFFLOAD_MODE={mode}"
        return "use a GPU with more memory"


def _has_guidance(sampling: Sampling, recipe: Recipe) -> bool:
    return recipe.fit(sampling).guidance_scale > 1


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
