"""Tables of the models and of the request's fields, from the definitions that the worker uses."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pipelines.catalog import MODELS
from worker.request import OBJECTS


def models_table() -> str:
    rows = [("model id", "model", "LoRAs", "image", "sizes")]
    rows += [
        (
            spec.id,
            spec.title,
            "high= and/or low=" if spec.moe else "one",
            {"none": "no", "optional": "optional", "required": "required"}[spec.control_image],
            f"multiples of {spec.size_divisor}",
        )
        for spec in MODELS.values()
    ]
    return _aligned(rows)


def fields_table() -> str:
    rows = [("field", "default", "meaning")]
    for prefix, owner in OBJECTS.items():
        for name, info in owner.model_fields.items():
            default = "required" if info.is_required() else "" if info.default is None else json.dumps(info.default)
            rows.append((prefix + name, default, info.description or ""))
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
