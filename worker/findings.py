"""Turns pydantic's findings about a request into words: the rule, a value that works, and the field that was meant.

A value that the client sent is repeated only if it is short and cannot be a secret.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from worker.errors import Code, Problem

_ALIASES = {
    "steps": "sample_steps",
    "num_inference_steps": "sample_steps",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "negative_prompt": "neg",
    "image": "ctrl_img",
    "image_url": "ctrl_img",
    "control_image": "ctrl_img",
    "last_image": "last_img",
    "end_image": "last_img",
    "flow_shift": "shift",
    "length": "num_frames",
    "frames": "num_frames",
    "frame_rate": "fps",
    "scheduler": "sampler",
    "strength": "network_multiplier",
    "weight": "network_multiplier",
    "scale": "network_multiplier",
    "lora_scale": "network_multiplier",
    "lora": "loras",
    "model_id": "model",
    "format": "output_format",
}
"""What other servers call these fields."""

_SECRET_FIELDS = {"hf_token", "path", "ctrl_img", "ctrl_img_1", "last_img"}
"""Values that are not repeated in an error, since they can be secrets, signed URLs or paths."""

_LONG_NUMBER = 10**40
"""Python itself writes no number of more than 4,300 digits."""

_MAX_PATH_PARTS = 6
"""How many parts of a path are shown; a path of the schema has at most three."""


Location = tuple[int | str, ...]
"""pydantic's: `("prompts", 1, "width")`."""

Models = Mapping[str, type[BaseModel]]
"""The objects of the schema by the prefix of their fields: `""`, `prompts[].`, `loras[].`, `trained_with.`."""


def problems_of(error: ValidationError, models: Models) -> Iterator[Problem]:
    """Yield every finding, with the rule of its field and a value that works."""
    for problem in error.errors(include_url=False):
        location = problem["loc"]
        where = path_of(location)
        if problem["type"] == "extra_forbidden":
            yield Problem(Code.INVALID_INPUT, where, _unknown_field(location, models))
        elif problem["type"] == "missing":
            yield Problem(Code.INVALID_INPUT, where, f"is required: {_rule(location, models)}")
        else:
            yield Problem(Code.INVALID_INPUT, where, f"must be {_rule(location, models)}{_received(problem)}")


def path_of(location: Location) -> str:
    """Return the location in words, such as `prompts[1].width`. One far deeper than the schema is cut off."""
    path = ""
    for part in location[:_MAX_PATH_PARTS]:
        path += f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" if path else _shown(part)
    return path + "…" * (len(location) > _MAX_PATH_PARTS)


def _shown(name: str) -> str:
    """Return a field's name, shortened and without odd characters: it can be any text of the client."""
    return re.sub(r"[^\w -]", "?", name[:32])


def _object_of(location: Location) -> str:
    """Return the object that contains the location, as a key of Models."""
    if len(location) < 2:
        return ""
    return f"{location[0]}[]." if isinstance(location[1], int) else f"{location[0]}."


def _unknown_field(location: Location, models: Models) -> str:
    name, here = str(location[-1])[:100].lower(), _object_of(location)
    fields = models[here].model_fields
    prefix_of = {known: prefix for prefix, model in reversed([*models.items()]) for known in model.model_fields}
    prefix_of |= dict.fromkeys(fields, "")
    meant = _ALIASES.get(name, name)
    if meant not in prefix_of:
        close = difflib.get_close_matches(name, fields, n=1, cutoff=0.6)
        close += difflib.get_close_matches(name, prefix_of, n=1, cutoff=0.8)
        if not close:
            return f"is not a field; the fields here are {', '.join(fields)}"
        meant = close[0]
    place = " of the request itself" if here and meant not in fields and not prefix_of[meant] else ""
    return f"is not a field here; did you mean `{prefix_of[meant]}{meant}`{place}?"


def _rule(location: Location, models: Models) -> str:
    """Return the rule of the field in words, with a value that works."""
    home = models[_object_of(location)]
    name = next((part for part in reversed(location) if isinstance(part, str)), "")
    if isinstance(location[-1], int):
        return f"an object with the fields {', '.join(home.model_fields)}"
    schema = _schema_of(home)[name]
    schema = {**schema, **next((kind for kind in schema.get("anyOf", []) if kind.get("type") != "null"), {})}
    if "$ref" in schema:
        return f"an object with fields such as {', '.join(models[f'{name}.'].model_fields)}"
    if "enum" in schema:
        return "one of " + ", ".join(f'"{value}"' for value in schema["enum"])
    if schema["type"] == "array":
        if "minItems" not in schema:
            return f"a list of at most {schema['maxItems']} items"
        return "a list with at least one item" + (f" and {schema['maxItems']} at most" if "maxItems" in schema else "")
    if schema["type"] == "boolean":
        return "true or false"
    kind = {"integer": "an integer", "number": "a number", "string": "a string"}[schema["type"]]
    if "maximum" in schema:
        kind += f" from {schema['minimum']} to {schema['maximum']}"
    if "maxLength" in schema:
        kind += f" of at most {schema['maxLength']} characters"
    return kind + (f", such as {schema['examples'][0]!r}" if "examples" in schema else "")


@cache
def _schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON Schema of each field. Cached, since pydantic needs milliseconds to write it."""
    fields: dict[str, Any] = model.model_json_schema()["properties"]
    return fields


def _received(problem: Any) -> str:
    """Return what the client sent, if it is shorter than a token and cannot be a secret."""
    value, name = problem["input"], problem["loc"][-1]
    if name in _SECRET_FIELDS:
        return ""
    if isinstance(value, int) and abs(value) >= _LONG_NUMBER:
        return "; got a longer number"
    if value is None or isinstance(value, (bool, int, float)):
        return f"; got {value}"
    if isinstance(value, str):
        return f"; got {value!r}" if re.fullmatch(r"[\w. -]{0,32}", value, re.ASCII) else "; got a text"
    kind = f"list of {len(value)}" if isinstance(value, list) else "object"
    return f"; got {f'a filled {kind}' if value else f'an empty {kind}'}"
