"""PEFT's settings in a LoRA file's header: read, checked, and brought down to one number per layer. No torch in this file.

diffusers and PEFT write them as `lora_adapter_metadata`. A setting that changes what a LoRA computes is honoured where it can
be (alpha and rank, rank-stabilised or not), and refused by its name where it cannot. So no file is applied at another strength
than it was trained for. Dropout is for training, and is never applied.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from pipelines.errors import LoraInvalid

ENTRY = "lora_adapter_metadata"

_HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern", "init_lora_weights",
    "lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "ensure_weight_tying", "arrow_config", "runtime_config", "trainable_token_indices", "fan_in_fan_out",
}  # fmt: skip
"""They say how the LoRA was trained or where it is loaded, and not what it computes."""
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
_NAME = re.compile(r"\^?[\w.\\-]+\$?")


class HeaderConfig:
    """The settings of one file. Raises LoraInvalid for what cannot be read or honoured."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        values = _entries(metadata.get(ENTRY, ""))
        for name, value in values.items():
            is_off = value in (None, False, [], {}, "", "none")
            if name not in _HARMLESS | _READ and not is_off:
                raise LoraInvalid(f"its header sets `{name}`, which this worker does not apply; export the LoRA without it")
        self._alpha = _number(values, "lora_alpha")
        self._rank = _number(values, "r")
        self._alphas = _pattern(values, "alpha_pattern")
        self._ranks = _pattern(values, "rank_pattern")
        self._rslora = values.get("use_rslora") is True

    @property
    def scales(self) -> bool:
        """Whether the header says anything about the strength."""
        return self._alpha is not None or bool(self._alphas)

    def scale_of(self, layer: str, rank: int) -> float:
        """alpha / rank of a layer whose tensors have `rank`, or alpha / sqrt(rank); 1 where the header gives no alpha."""
        said = _lookup(self._ranks, layer, self._rank)
        if said is not None and said != rank and self.scales:
            raise LoraInvalid(f"its header gives layer {layer} the rank {said:g}, and its tensors have {rank}; export it again")
        alpha = _lookup(self._alphas, layer, self._alpha)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self._rslora else rank)


def _entries(text: str) -> dict[str, Any]:
    """The settings of the transformer, without their prefix."""
    if not text:
        return {}
    try:
        value = json.loads(text) if len(text) <= 1_000_000 else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise LoraInvalid(f"its header's `{ENTRY}` is not a JSON object; export the LoRA again")
    return {name.removeprefix("transformer."): item for name, item in value.items() if not name.startswith("text_encoder")}


def _number(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    return None if value is None else _positive(value, name)


def _pattern(values: Mapping[str, Any], name: str) -> dict[str, float]:
    """Layer names, or the ends of names, to numbers. Regular expressions, which PEFT takes too, are refused."""
    pattern = values.get(name) or {}
    if not isinstance(pattern, dict) or not all(_NAME.fullmatch(key) for key in pattern):
        raise LoraInvalid(f"its header's `{name}` does not map layer names to numbers; export the LoRA again")
    return {key.strip("^$").replace("\\", ""): _positive(value, name) for key, value in pattern.items()}


def _positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise LoraInvalid(f"its header's `{name}` is not a positive number; export the LoRA again")
    return float(value)


def _lookup(pattern: Mapping[str, float], layer: str, default: float | None) -> float | None:
    return next((value for key, value in pattern.items() if layer == key or layer.endswith(f".{key}")), default)
