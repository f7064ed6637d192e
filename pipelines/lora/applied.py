"""The LoRAs that a model carries, how each is carried, and how the weights beneath them are rounded.

A LoRA is an adapter of peft, is merged into the weights, or lies beside the layers. `fit` knows what each of them can carry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pipelines.catalog import OFFLOAD, LoraMode, ModelSpec, OffloadMode
from pipelines.checkpoints import Checkpoints
from pipelines.errors import LoraError, LoraIncompatible, blamed_on
from pipelines.kept_in_float32 import KeptInFloat32
from pipelines.lora import fit
from pipelines.lora.adapters import Adapters
from pipelines.lora.beside import Beside
from pipelines.lora.file import Adapter, LoraFile
from pipelines.lora.fit import Stack
from pipelines.lora.layers import read, reading_of
from pipelines.lora.merge import Merges
from pipelines.lora.values import has_effect, zero_keys
from pipelines.offload import refresh
from pipelines.pristine import CheckpointFile
from pipelines.quantized import CodedLinear, Quantized
from pipelines.trained import Quantization


class AppliedLoras:
    """What one model's transformers carry."""

    def __init__(
        self, spec: ModelSpec, pipe: Any, checkpoints: Checkpoints, device: torch.device, quantization: Quantization | None
    ) -> None:
        """`quantization`: which weights are kept as codes, for all jobs; None: none."""
        self.quantization = quantization
        self.offload_mode: OffloadMode = "none"
        self._spec = spec
        self._pipe = pipe
        transformers = {name: getattr(pipe, name) for name in spec.transformers}
        self._dtype = dtype = pipe.transformer.dtype
        coded = {name: module for name, module in pipe.transformer.named_modules() if isinstance(module, CodedLinear)}
        self._coded = frozenset(coded)
        self._shapes = {name: tuple(value.shape) for name, value in pipe.transformer.named_parameters()}
        self._shapes |= {f"{name}.weight": (module.out_features, module.in_features) for name, module in coded.items()}
        files = {name: CheckpointFile(checkpoints.folder_of(name), name) for name in (*transformers, "text_encoder")}
        self._adapters = Adapters(spec, pipe)
        self._merges = Merges(pipe, files, device)
        self._beside = {name: Beside(transformer, device) for name, transformer in transformers.items()}
        self._recovery = {name: Beside(transformer, device, dtype) for name, transformer in transformers.items()}
        self._rounded = {name: Quantized(transformer, files[name], device) for name, transformer in transformers.items()}
        self._rounded_text_encoder = Quantized(pipe.text_encoder, files["text_encoder"], device)
        self._kept_in_float32 = KeptInFloat32(list(transformers.values()))
        if quantization:
            self._kept_in_float32.cast(dtype)  # as the trainer does before it quantizes

    @property
    def are_merged(self) -> bool:
        return self._merges.are_active

    @property
    def rounding_of_text_encoder(self) -> tuple[object, ...]:
        """Differs where the weights of the text encoder do."""
        return self._rounded_text_encoder.active

    @property
    def are_compiled(self) -> bool:
        """Whether the transformers' blocks are; see `Adapters`."""
        return self._adapters.are_compiled

    @are_compiled.setter
    def are_compiled(self, are_compiled: bool) -> None:
        self._adapters.are_compiled = are_compiled

    @property
    def need_eager_code(self) -> bool:
        """Compiled code does not look for hooks that came later: those of LoRAs beside layers and of rounded weights."""
        return any(part.is_active for part in self._all_beside) or self._are_rounded

    @property
    def _all_beside(self) -> list[Beside]:
        return [*self._beside.values(), *self._recovery.values()]

    @property
    def _are_rounded(self) -> bool:
        return any(part.active for part in self._rounded.values())

    def check(self, adapter: Adapter, mode: LoraMode = "adapter") -> list[str]:
        """Compare a LoRA with the model by keys, shapes and values, and return warnings. Several threads may call it.

        Raises LoraInvalid, LoraIncompatible.
        """
        reading = fit.check(adapter.file, self._spec, self._shapes, adapter.without)
        fit.check_side(adapter, reading)
        warnings = fit.hints(adapter, self._spec, reading)
        zeros = zero_keys(adapter.file)
        how, why_merged = fit.mode_for(reading, self._possible(mode), self._shapes, zeros)
        if self.quantization and (why := fit.why_not_on_codes(reading, self._coded, zeros)):
            raise LoraIncompatible(f"{why}, which cannot be applied with QUANTIZE; use a worker without QUANTIZE")
        if why_merged and not OFFLOAD[self.offload_mode].can_merge:
            raise LoraIncompatible(f"{why_merged}; OFFLOAD_MODE={self.offload_mode} cannot do that, so use another mode")
        if how == "merge" and why_merged and not self.quantization:
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
        reading = fit.check(file, self._spec, self._shapes)
        if fit.mode_for(reading, "beside", self._shapes, zero_keys(file)) != ("beside", ""):
            raise LoraIncompatible("it has parts other than LoRA or LoKr factors; give the adapter that the training used")

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

    def apply(
        self, adapters: Sequence[Adapter], mode: LoraMode, quantization: Quantization | None, recovery: Adapter | None
    ) -> None:
        """See `WanModel.apply_loras`. After an exception, call `drop_all`."""
        self._quantize(quantization, recovery, mode == "beside")
        plan = self.plan(adapters, mode)
        for name in self._spec.transformers:
            how, stack = plan.get(name, ("adapter", ()))
            with _blamed_on_its_place(stack, adapters):
                self._carry(name, stack, how)

    def drop_all(self) -> None:
        """Make the model plain, whatever state it is in."""
        for part in self._all_beside:
            part.drop()
        self._adapters.drop_all()
        self._quantize(None, None, False)
        self._merges.take_out_all()

    def cast_as_trainer(self, as_trainer: bool) -> None:
        """Cast what diffusers keeps in float32 as the trainer does, or restore it. Beneath rounded weights it stays cast."""
        if as_trainer:
            changed = self._kept_in_float32.cast(self._dtype)
        else:
            changed = not (self.quantization or self._are_rounded) and self._kept_in_float32.restore()
        if changed:
            refresh(self._pipe, self._spec.transformers)

    def _quantize(self, wanted: Quantization | None, recovery: Adapter | None, is_beside: bool) -> None:
        """Round the weights as wanted, or restore them. The trainer casts the whole model first, and so does this.

        `is_beside`: LoRAs will lie beside the weights, and their differences are for the weights as the trainer casts them.
        """
        if self.quantization:
            return  # the codes are what they are
        beneath = fit.by_transformer([recovery]) if recovery else {}
        if recovery and not read(recovery.file).has_both_sides:
            beneath = dict.fromkeys(self._spec.transformers, beneath["transformer"])
        format = wanted.transformer if wanted else None
        if format or is_beside:
            for name in self._spec.transformers:
                self._adapters.apply(name, ())
                self._merges.apply(name, ())
            if self._kept_in_float32.cast(self._dtype):
                refresh(self._pipe, self._spec.transformers)
        changed = [name for name, part in self._rounded.items() if self._round(name, part, wanted, beneath.get(name, ()))]
        if self._rounded_text_encoder.apply(wanted.text_encoder if wanted else None):
            changed.append("text_encoder")
        if not (format or is_beside) and self._kept_in_float32.restore():
            changed = [*self._spec.transformers, *changed]
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
            if self._rounded[name].active:
                modes = [self.mode_of(adapter, "beside") for adapter, _ in wanted]
                with blamed_on(modes.index("merge") if "merge" in modes else 0):
                    raise LoraIncompatible(
                        "it has a bias, magnitude or kernel beside its factors, which cannot be merged into quantized weights; "
                        "send it with `match` documented, or without `trained_with`"
                    )
            self._adapters.apply(name, ())
            self._merges.apply(name, wanted)
        elif how == "beside":
            self._adapters.apply(name, ())  # first: it puts the layers back that it had wrapped
            factors, rest = fit.split(wanted, self._shapes, zero_keys)
            for position, (_, layers) in enumerate(rest):
                if rounded := layers.keys() & self._rounded[name].layers:
                    with blamed_on(position):
                        raise LoraIncompatible(
                            f"it has a difference of a weight or bias of {min(rounded)}, which the training quantized; send it "
                            "with `match` documented, or without `trained_with`"
                        )
            self._merges.apply(name, rest, go_with_factors=True)
            self._beside[name].apply(factors)
        else:
            self._merges.apply(name, ())
            products = fit.products_of(wanted)  # what is not a product of factors is zero here
            with _blamed_on_its_place(products, [adapter for adapter, _ in wanted]):
                self._adapters.apply(name, products)


@contextmanager
def _blamed_on_its_place(stack: Stack, adapters: Sequence[Adapter]) -> Iterator[None]:
    """Turn the place in `stack` of a LoRA at fault into its place in `adapters`, which are more, or in another order."""
    try:
        yield
    except LoraError as error:
        if stack:
            at_fault = stack[error.position or 0][0]
            error.position = next(number for number, adapter in enumerate(adapters) if adapter is at_fault)
        raise
