"""What all models share: size and frame rules, seeding, schedulers, and the way from a prompt to frames.

A family's own module says how its pipeline is put together and called.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import numpy.typing as npt
import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from PIL import Image, ImageOps

from pipelines import diffusers_privates as privates
from pipelines.catalog import OFFLOAD, LoraMode, ModelSpec, OffloadMode
from pipelines.cfg_parallel import RANKS, CfgParallel
from pipelines.checkpoints import Checkpoints
from pipelines.clock import timed
from pipelines.compiled import compile_blocks, compiler_settings
from pipelines.decode import decode
from pipelines.embeddings import cache_embeddings
from pipelines.errors import DeviceLost, DeviceUnavailable, LoraError, LoraIncompatible, LoraInvalid, OutOfMemory, blamed_on
from pipelines.few_steps import FewStepEuler
from pipelines.image_processor import TensorImageProcessor
from pipelines.lora import fit
from pipelines.lora.adapters import Adapters
from pipelines.lora.beside import Beside
from pipelines.lora.file import Adapter, LoraFile
from pipelines.lora.fit import Stack
from pipelines.lora.layers import read, reading_of
from pipelines.lora.merge import Merges
from pipelines.lora.values import has_effect, zero_keys
from pipelines.offload import Swap, place, refresh
from pipelines.pristine import CheckpointFile
from pipelines.quantized import CodedLinear, Quantized, encode_layers, fill_with_codes
from pipelines.recipes import Recipe, Sampling, documented
from pipelines.toolkit import Toolkit
from pipelines.trained import Quantization
from pipelines.weights import file_names

Frames = npt.NDArray[np.uint8]
"""[frames, height, width, 3], RGB."""

OnStep = Callable[[int], None]
"""Called with the number of finished denoising steps. What it raises ends the generation."""


UNIPC = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
    "time_shift_type": "exponential",
    "use_dynamic_shifting": False,
}
"""UniPC as the model pages and the trainer's older versions set it by hand; the flow_shift is the model's."""


_NOT_ARGUMENTS = {"seed", "guidance_scale_2", "image_fit", "control_image", "last_image"}
"""Fields of Sampling that not every pipeline takes as they are."""
_MOST_SCHEDULERS = 64
"""A request may ask for any shift, and each has a scheduler of some kB."""


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
        self._swap: Swap | None = None
        self._parallel: CfgParallel | None = None
        self.facts: dict[str, Any] = {}
        """See `facts_of`."""
        self.bytes_by_mode: dict[OffloadMode, int] = {}
        """Weights on the device in each offload mode; empty on a CPU."""
        self.device = parts.device
        self._pipe = pipe
        self._pipe.set_progress_bar_config(disable=True)
        self._checkpoint_scheduler = pipe.scheduler
        self._fresh_schedulers: dict[tuple[object, ...], Any] = {}
        """By solver, shift and timesteps; never run."""
        self._image_processor = getattr(pipe, "image_processor", None)
        self._checkpoint_boundary_ratio = pipe.config.boundary_ratio
        self._pieces_of = privates.decode_pieces if privates.can_decode_in_pieces(pipe.vae) else privates.decode_whole
        cache_embeddings(pipe, lambda: (self._text_attention, self._text_encoder.active))
        self._parts_out: dict[tuple[int, ...], int] = {}
        """How many parts of the model had to leave the device for a decode, by the shape of its latents."""
        self._shapes = {name: tuple(value.shape) for name, value in pipe.transformer.named_parameters()}
        coded = {name: module for name, module in pipe.transformer.named_modules() if isinstance(module, CodedLinear)}
        self._coded = frozenset(coded)
        self._shapes |= {f"{name}.weight": (module.out_features, module.in_features) for name, module in coded.items()}
        self._adapters = Adapters(spec, pipe)
        files = {name: CheckpointFile(parts.checkpoints.folder_of(name), name) for name in (*spec.transformers, "text_encoder")}
        self._merges = Merges(pipe, files, parts.device)
        self._text_encoder = Quantized(pipe.text_encoder, files["text_encoder"], parts.device)
        self._text_attention = "sdpa"
        self._quantized = {name: Quantized(getattr(pipe, name), files[name], parts.device) for name in spec.transformers}
        self._recovery = {name: Beside(getattr(pipe, name), parts.device, pipe.transformer.dtype) for name in spec.transformers}
        self._beside = {name: Beside(getattr(pipe, name), parts.device) for name in spec.transformers}
        self._kept_in_float32 = KeptInFloat32([getattr(pipe, name) for name in spec.transformers])
        self.quantization = parts.quantization
        """What is kept as codes, for all jobs; None: nothing."""
        if self.quantization:
            self._kept_in_float32.cast(pipe.transformer.dtype)  # as the trainer does before it quantizes

    def place(self, mode: OffloadMode) -> None:
        """Set up the offloading of `mode`, once."""
        self._swap = place(self._pipe, self.device, mode)
        self.facts["offload_mode"] = mode

    def compile_blocks(self, cache_dir: Path | None = None, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the transformers' blocks, before the first LoRA is applied; see `compiled.compile_blocks`."""
        if not OFFLOAD[mode := self.facts["offload_mode"]].can_compile:
            raise DeviceUnavailable(f"COMPILE=1 does not go with OFFLOAD_MODE={mode}, which fits this GPU; set COMPILE=0")
        compile_blocks([getattr(self._pipe, name) for name in self.spec.transformers], self.device, cache_dir, backend)
        self._adapters.are_compiled = True
        self.facts["compiled"] = True

    def share_passes(self, parallel: CfgParallel) -> None:
        """From now on compute only this rank's pass of each step with guidance."""
        self._parallel = parallel
        self.facts["gpus"] = RANKS

    def check_lora(self, adapter: Adapter, mode: LoraMode = "adapter") -> list[str]:
        """Compare a LoRA with the model by keys, shapes and values, and return warnings. Several threads may call it.

        Raises LoraInvalid, LoraIncompatible.
        """
        reading = fit.check(adapter.file, self.spec, self._shapes, adapter.without)
        fit.check_side(adapter, reading)
        warnings = fit.hints(adapter, self.spec, reading)
        zeros = zero_keys(adapter.file)
        _, why_merged = fit.mode_for(reading, self._possible(mode), self._shapes, zeros)
        if self.quantization and (why := fit.why_not_on_codes(reading, self._coded, zeros)):
            raise LoraIncompatible(f"{why}, which cannot be applied with QUANTIZE; use a worker without it")
        if why_merged and not OFFLOAD[self.facts["offload_mode"]].can_merge:
            raise LoraIncompatible(f"{why_merged}, which OFFLOAD_MODE={self.facts['offload_mode']} cannot do; use another mode")
        if why_merged and not self.quantization:
            warnings.append(why_merged)
        if idle := [key for layer in reading.all_layers if layer.kind == "full" for key in layer.keys.values() if key in zeros]:
            warnings.append(f"{len(idle)} keys of the LoRA have no effect, since they are 0, such as `{idle[0]}`")
        if not has_effect(adapter.file):
            warnings.append("the LoRA has no effect: a factor of every layer is all 0, as before the first training step")
        elif adapter.scale == 0:
            warnings.append("the LoRA has no effect: its network_multiplier is 0")
        return warnings

    def check_recovery_adapter(self, file: LoraFile) -> None:
        """Compare an accuracy recovery adapter with the model. Raises LoraInvalid, LoraIncompatible."""
        reading = fit.check(file, self.spec, self._shapes)
        if fit.mode_for(reading, "beside", self._shapes, zero_keys(file))[0] != "beside":
            raise LoraIncompatible("it has other parts than LoRA or LoKr factors, which lie beneath no LoRA")

    def mode_of(self, adapter: Adapter, mode: LoraMode) -> LoraMode:
        """How a LoRA is applied when `mode` is asked for: what an adapter cannot carry is merged."""
        how, _ = fit.mode_for(reading_of(adapter), self._possible(mode), self._shapes, zero_keys(adapter.file))
        return self._possible(how)

    def plan(self, adapters: Sequence[Adapter], mode: LoraMode) -> dict[str, tuple[LoraMode, Stack]]:
        """How each transformer carries its LoRAs, and which, in order. Where one must be merged, all of its transformer are."""
        plan: dict[str, tuple[LoraMode, Stack]] = {}
        for name, stack in fit.by_transformer(adapters).items():
            modes = {self.mode_of(adapter, mode) for adapter, _ in stack}
            plan[name] = (max(modes, key=("adapter", "beside", "merge").index), stack)
        return plan

    def _possible(self, mode: LoraMode) -> LoraMode:
        """No factors are merged into codes: they lie beside them, as in the trainer."""
        return "beside" if mode == "merge" and self.quantization else mode

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
                self._quantize(quantization, recovery)
                plan = self.plan(adapters, mode)
                for name in self.spec.transformers:
                    how, stack = plan.get(name, ("adapter", ()))
                    with _blamed_on_its_place(stack, adapters):
                        self._carry(name, stack, how)
        except BaseException:
            with self._device_errors():  # a dead device must not hide behind the error of this clean-up
                self._adapters.drop_all()
                self._quantize(None, None)
                self._merges.take_out_all()
            raise

    def _quantize(self, wanted: Quantization | None, recovery: Adapter | None) -> None:
        """Round the weights as wanted, or restore them. The trainer casts the whole model first, and so does this."""
        if self.quantization:
            return  # the codes are what they are
        beneath = fit.by_transformer([recovery]) if recovery else {}
        if recovery and not read(recovery.file).has_both_sides:
            beneath = dict.fromkeys(self.spec.transformers, beneath["transformer"])
        format = wanted.transformer if wanted else None
        if format:
            for name in self.spec.transformers:
                self._adapters.apply(name, ())
                self._merges.apply(name, ())
            if self._kept_in_float32.cast(self._pipe.transformer.dtype):
                refresh(self._pipe, self.spec.transformers)
        changed = [name for name, part in self._quantized.items() if self._round(name, part, wanted, beneath.get(name, ()))]
        if self._text_encoder.apply(wanted.text_encoder if wanted else None):
            changed.append("text_encoder")
        if not format and self._kept_in_float32.restore():
            changed = [*self.spec.transformers, *changed]
        if changed:
            refresh(self._pipe, tuple(changed))

    def _round(self, name: str, part: Quantized, wanted: Quantization | None, recovery: Stack) -> bool:
        """Round one transformer. With a recovery adapter, only the layers that it has are rounded."""
        only = frozenset(recovery[0][1]) if recovery else None
        changed = part.apply(wanted.transformer if wanted else None, wanted.excluded if wanted and not only else (), only)
        if changed:
            self._beside[name].drop()  # the hooks of the recovery adapter and of the biases come first
            self._recovery[name].drop()
        self._recovery[name].apply(recovery)
        return changed

    def _carry(self, name: str, wanted: Stack, how: LoraMode) -> None:
        """Make one transformer carry exactly these LoRAs."""
        if how != "beside":
            self._beside[name].drop()
        if how == "merge":
            if self._quantized[name].active:
                modes = [self.mode_of(adapter, "beside") for adapter, _ in wanted]
                with blamed_on(modes.index("merge") if "merge" in modes else 0):
                    raise LoraIncompatible(
                        "its differences of weights or biases are merged, which the trainer never does on quantized weights; "
                        "send it with `match` documented, or without `trained_with`"
                    )
            self._adapters.apply(name, ())
            self._merges.apply(name, wanted)
        elif how == "beside":
            self._adapters.apply(name, ())  # first: it puts the layers back that it had wrapped
            factors, rest = fit.split(wanted, self._shapes, zero_keys)
            self._merges.apply(name, rest)
            self._beside[name].apply(factors)
        else:
            self._merges.apply(name, ())
            # What is not a product of factors is zero here.
            self._adapters.apply(name, fit.products_of(wanted))

    def generate(
        self, sampling: Sampling, recipe: Recipe | None = None, on_step: OnStep | None = None
    ) -> Generator[Frames, None, None]:
        """Make one video, by default as the model page says, yielding its frames as they are decoded.

        The same arguments give bit-equal frames on the same machine whatever ran before. Nothing is computed before the
        first frames are asked for. Raises OutOfMemory, DeviceLost, ValueError (the model needs a control image, or takes
        none), LoraInvalid (its values are too large), and whatever `on_step` raises.
        """
        recipe = recipe or documented(self.spec)
        sampling = self._fit(sampling, recipe)
        with self._device_errors():
            try:
                latents = self._latents(sampling, recipe, on_step)
                self._check_finite(latents)
                with self._tiles(recipe):
                    yield from self._decode(latents, privates.decode_whole if recipe.decodes_in_tiles else self._pieces_of)
            finally:
                self._pipe.maybe_free_model_hooks()

    def shares(self, sampling: Sampling, recipe: Recipe) -> bool:
        """Whether the other rank must `denoise` this video while this one runs `generate`; without guidance it has no share."""
        return self._parallel is not None and recipe.fit(sampling).guidance_scale > 1

    def denoise(self, sampling: Sampling, recipe: Recipe) -> None:
        """What a rank other than 0 does for a video. Raises what `generate` raises, and RankFailed."""
        with self._device_errors():
            try:
                self._latents(self._fit(sampling, recipe), recipe, None)
            finally:
                self._pipe.maybe_free_model_hooks()

    def _latents(self, sampling: Sampling, recipe: Recipe, on_step: OnStep | None) -> torch.Tensor:
        transformers = [getattr(self._pipe, name) for name in self.spec.transformers]
        sharing: Any = contextlib.nullcontext()
        if self._parallel and sampling.guidance_scale > 1:
            sharing = self._parallel.one_video(transformers)
        with sharing:
            self._apply_recipe(recipe)
            swapping = self._swap or contextlib.nullcontext()
            with torch.no_grad(), swapping, self._compiled(), _seeded(sampling.seed, self.device) as generator:
                return self._denoise(sampling, generator, _step_end(on_step))

    def _check_finite(self, latents: torch.Tensor) -> None:
        """Raises LoraInvalid for latents that would be black frames."""
        if not bool(latents.isfinite().all()):
            raise LoraInvalid(
                "the video came out as numbers that are not finite: the LoRA's values are too large; lower its "
                "network_multiplier, or use an earlier save"
            )

    @property
    def _is_quantized(self) -> bool:
        return self.quantization is not None or any(part.active for part in self._quantized.values())

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        """Have blocks compiled within, where they are to be.

        Compiled code does not look for hooks that came later, so that with hooks it is not used.
        """
        hooked = any(part.is_active for part in (*self._beside.values(), *self._recovery.values()))
        if not self._adapters.are_compiled:
            yield
        elif hooked or self._is_quantized:
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            with compiler_settings():
                yield

    @contextmanager
    def _tiles(self, recipe: Recipe) -> Iterator[None]:
        """Decode in tiles, as the trainer does to save memory."""
        if recipe.decodes_in_tiles:
            self._pipe.vae.enable_tiling()
        try:
            yield
        finally:
            self._pipe.vae.disable_tiling()

    def tokens_of(self, prompt: str) -> int:
        """How many tokens the text encoder would need for a prompt. It reads MAX_TOKENS, and cuts off the rest."""
        return len(self._pipe.tokenizer(prompt_clean(prompt), add_special_tokens=True)["input_ids"])

    def scheduler_of(self, recipe: Recipe) -> Any:
        """A scheduler that was never run; a video gets a copy, so that no solver state outlives it."""
        key = (recipe.solver, recipe.shift, recipe.timesteps)
        if key not in self._fresh_schedulers:
            if len(self._fresh_schedulers) >= _MOST_SCHEDULERS:
                self._fresh_schedulers.clear()
            self._fresh_schedulers[key] = self._make_scheduler(recipe)
        return self._fresh_schedulers[key]

    def _make_scheduler(self, recipe: Recipe) -> Any:
        if recipe.timesteps is not None:
            return FewStepEuler(recipe.timesteps, recipe.shift)
        if recipe.solver == "flowmatch":
            return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=recipe.shift)
        if recipe.solver == "unipc":
            return diffusers.UniPCMultistepScheduler(**UNIPC, flow_shift=recipe.shift)
        config = self._checkpoint_scheduler.config
        name = "flow_shift" if "flow_shift" in config else "shift"
        return self._checkpoint_scheduler.from_config(config, **({} if recipe.shift is None else {name: recipe.shift}))

    def numbers_of(self, recipe: Recipe) -> dict[str, Any]:
        """What a recipe comes to on this model: scheduler class, its shift, boundary_ratio, and the timesteps of a draft."""
        scheduler = self.scheduler_of(recipe)
        config = scheduler.config
        return {
            "scheduler": type(scheduler).__name__,
            "shift": config.get("flow_shift", config.get("shift")),
            "boundary_ratio": self.boundary_ratio_of(recipe) if self.spec.moe else None,
            **({"timesteps": scheduler.timesteps.tolist()} if recipe.is_draft else {}),
        }

    def boundary_ratio_of(self, recipe: Recipe) -> float | None:
        """Where `transformer_2` takes over, as a part of the noise schedule."""
        return self._checkpoint_boundary_ratio if recipe.boundary_ratio is None else recipe.boundary_ratio

    def _apply_recipe(self, recipe: Recipe) -> None:
        self._pipe.scheduler = copy.deepcopy(self.scheduler_of(recipe))
        self._pipe.register_to_config(boundary_ratio=self.boundary_ratio_of(recipe))
        if recipe.text_attention != self._text_attention:
            self._pipe.text_encoder.set_attn_implementation(recipe.text_attention)
            self._text_attention = recipe.text_attention
        if self._image_processor is not None:
            own = self._image_processor
            self._pipe.image_processor = TensorImageProcessor(own) if recipe.image_resize == "torch" else own
        if recipe.trainer_dtypes:
            changed = self._kept_in_float32.cast(self._pipe.transformer.dtype)
        else:
            changed = not self._is_quantized and self._kept_in_float32.restore()
        if changed:
            refresh(self._pipe, self.spec.transformers)

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

    def _decode(self, latents: torch.Tensor, pieces_of: Callable[..., Iterator[torch.Tensor]]) -> Iterator[Frames]:
        """The frames of the latents. Where the memory does not do, again with the rest of the model out of the way.

        The arithmetic is the same, and so are the frames; tiles, the usual remedy, would change them.
        """
        waiting, number = self._rest_of_the_model(), 0
        known = self._parts_out.get(latents.shape, 0)  # as the last decode of this size needed it
        out_of_the_way, waiting = waiting[:known], waiting[known:]
        try:
            for module in out_of_the_way:
                module.to("cpu")
            while True:
                try:
                    for frames in itertools.islice(decode(self._pipe.vae, latents, self.device, pieces_of), number, None):
                        yield frames
                        number += 1
                    return
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self._free(error)  # before anything comes back to the device
                    if not waiting:
                        raise
                out_of_the_way.append(waiting.pop(0))
                out_of_the_way[-1].to("cpu")
                self._parts_out[latents.shape] = len(out_of_the_way)
        finally:
            self._bring_back(out_of_the_way)

    def _bring_back(self, modules: Iterable[torch.nn.Module]) -> None:
        """Raises DeviceLost when the device has no room for what was on it before: nothing heals half a model."""
        try:
            for module in modules:
                module.to(self.device)
        except (RuntimeError, MemoryError) as error:
            raise DeviceLost("the model does not fit back onto the device") from error

    def _rest_of_the_model(self) -> list[torch.nn.Module]:
        """What a decode does not need and another memory could hold."""
        if self.device.type == "cpu":
            return []
        names = ("text_encoder", "image_encoder", "transformer", "transformer_2")
        waiting = self.spec.waits_in_memory(self.facts["offload_mode"])
        parts = [getattr(self._pipe, name, None) for name in names if name not in waiting]
        return list({id(part): part for part in parts if part is not None}.values())

    def device_answers(self) -> bool:
        """Whether the device still computes: after an illegal access, an assert or an ECC error it does not, for ever."""
        try:
            probe = torch.ones(8, device=self.device)
            return float((probe + probe).sum()) == 16
        except torch.OutOfMemoryError:
            return True
        except RuntimeError:
            return False

    @contextmanager
    def _device_errors(self) -> Iterator[None]:
        """What the device raises, told apart by a probe of the device and not by the text of the exception."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            out_of_memory = is_out_of_memory(error)
            if out_of_memory:
                self._free(error)
            if not self.device_answers():
                raise DeviceLost("the device no longer answers") from error
            self._refresh_after(error)
            if out_of_memory:
                raise OutOfMemory(
                    f"the device ran out of memory; ask for fewer frames or a smaller size, or {self._memory_remedy()}"
                ) from None
            raise

    def _refresh_after(self, error: Exception) -> None:
        """Bring back to main memory what a pass that died of `error` left on the device.

        Streaming would throw it away, with whatever is written into it by then. Raises DeviceLost when there is no room.
        """
        try:
            refresh(self._pipe, ("text_encoder", *self.spec.transformers))
        except (RuntimeError, MemoryError):
            raise DeviceLost("the model does not fit back into main memory") from error

    def _memory_remedy(self) -> str:
        """What the operator can change: an offload mode with fewer weights on the device, where there is one for this model."""
        if self.device.type == "cpu":
            return "run the worker on a machine with more memory"
        now = self.bytes_by_mode[self.facts["offload_mode"]]
        for mode in self.spec.offload_modes:
            can_be_used = (OFFLOAD[mode].can_merge or not self._merges.are_active) and (
                OFFLOAD[mode].can_compile or not self.facts["compiled"]
            )
            if self.bytes_by_mode[mode] < now and can_be_used:
                return f"run the worker with OFFLOAD_MODE={mode}"
        return "use a GPU with more memory"

    def _free(self, error: Exception) -> None:
        """Give back what the call that died of `error` had in memory."""
        traceback.clear_frames(error.__traceback__)  # they hold its tensors: without this there is nothing to free yet
        gc.collect()
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # a dead device
                torch.cuda.empty_cache()


@contextmanager
def _blamed_on_its_place(stack: Stack, adapters: Sequence[Adapter]) -> Iterator[None]:
    """Turn the place in `stack` of a LoRA at fault into its place in `adapters`."""
    try:
        yield
    except LoraError as error:
        if stack:
            at_fault = stack[error.position or 0][0]
            error.position = next(number for number, adapter in enumerate(adapters) if adapter is at_fault)
        raise


class KeptInFloat32:
    """The tensors of a bf16 model that diffusers keeps in a wider dtype, and the trainer does not."""

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        self._is_cast = False
        self._wide = [
            (owner, name, tensor)
            for model in models
            for module in model.modules()
            for owner in cast("tuple[dict[str, Any], ...]", (module._parameters, module._buffers))
            for name, tensor in owner.items()
            if tensor is not None and tensor.is_floating_point() and tensor.dtype != model.dtype
        ]

    def cast(self, dtype: torch.dtype) -> bool:
        """Cast them as the trainer's `.to(dtype)` on the whole model does. Whether there was anything to do."""
        if self._is_cast:
            return False
        for owner, name, tensor in self._wide:
            narrow = tensor.detach().to(dtype)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            owner[name] = torch.nn.Parameter(narrow, requires_grad=False) if is_parameter else narrow
        self._is_cast = True
        return True

    def restore(self) -> bool:
        """Put the very tensors of the load back. Whether there was anything to do."""
        if not self._is_cast:
            return False
        for owner, name, tensor in self._wide:
            owner[name] = tensor
        self._is_cast = False
        return True


class Parts:
    """Loads the components of a model, each from its own repo and to its device before the next one, and times them.

    Files in the model's dtype are mapped and go to a GPU as they are; of others, one component is in main memory at a time.
    """

    def __init__(
        self,
        spec: ModelSpec,
        checkpoints: Checkpoints,
        dtype: torch.dtype,
        device: torch.device,
        offload_mode: OffloadMode,
        took: dict[str, float],
        quantization: Quantization | None = None,
    ) -> None:
        """`took` gets the seconds of each component. What `offload_mode` moves to the device later stays in main memory.

        `quantization`: which weights are kept as codes.
        """
        self.quantization = quantization
        self.spec = spec
        self.checkpoints = checkpoints
        self.stored = checkpoints.stored()
        self.device = device
        self._dtype = dtype
        self._stay_in_memory = spec.waits_in_memory(offload_mode)
        self._took = took

    def load(self, names: Iterable[str]) -> dict[str, Any]:
        parts = {}
        for name in names:
            with timed(self._took, name):
                parts[name] = self._load(name)
        return parts

    def _load(self, name: str) -> Any:
        source = self.spec.sources[name]
        repo, options = self.checkpoints.repo_of(name), {"subfolder": source.subfolder, "local_files_only": True}
        if name == "tokenizer":
            return transformers.AutoTokenizer.from_pretrained(repo, **options)
        part_class = {
            "transformer": diffusers.WanTransformer3DModel,
            "transformer_2": diffusers.WanTransformer3DModel,
            "vae": diffusers.AutoencoderKLWan,
            "text_encoder": transformers.UMT5EncoderModel,
            "image_encoder": transformers.CLIPVisionModel,
        }[name]
        if name in self.stored:
            part = self._from_codes(name, part_class)
        else:
            part = part_class.from_pretrained(repo, dtype=self._dtype, use_safetensors=True, **options)
        if self.quantization and name not in self.stored:
            encode_layers(part, partial(self.quantization.format_of, name), self.device, self._dtype)
        return part if name in self._stay_in_memory else part.to(self.device)

    def _from_codes(self, name: str, part_class: Any) -> Any:
        """A component of which the files have the codes."""
        folder = self.checkpoints.folder_of(name)
        with init_empty_weights():
            if issubclass(part_class, diffusers.ModelMixin):
                part = part_class.from_config(part_class.load_config(folder, local_files_only=True))
            else:
                part = part_class(part_class.config_class.from_pretrained(folder, local_files_only=True))
        files = [folder / file for file in file_names(folder, name)]
        fill_with_codes(part, files, self.stored[name], self._dtype)
        return part.eval()


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


_OUT_OF_MEMORY = re.compile(
    r"out of memory|DefaultCPUAllocator|can't allocate memory|ALLOC_FAILED|ALLOCATION_FAILED", re.IGNORECASE
)
"""cudaHostAlloc (pinned memory) says "out of memory", cuBLAS and cuDNN "…_STATUS_ALLOC_FAILED"."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a call failed for want of memory. torch has a type for CUDA's own; other libraries only say it in their text."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
