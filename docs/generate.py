"""Write the tables of the documentation (fields, errors, models, environment, figures) from the code and the benchmarks.

    python -m docs.generate           rewrites the schemas, the types of client/js and the generated parts of the Markdown files
    python -m docs.generate --check   exits with 1 when one of them is not current

A generated part lies between `<!-- begin: NAME -->` and `<!-- end: NAME -->`.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from docs import figures, js_types, openapi
from pipelines.catalog import MODELS, Family, ModelSpec
from worker.errors import MEANING
from worker.request import OBJECTS, Request
from worker.settings import Settings

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "docs/request.schema.json"
OPENAPI = ROOT / "docs/openapi.json"
TYPES = ROOT / "client/js/worker-wan-lora.d.ts"
PIPELINE_OF: dict[Family, str] = {
    "t2v": "`diffusers.WanPipeline`",
    "i2v": "`diffusers.WanImageToVideoPipeline`",
    "toolkit_i2v": "ai-toolkit's `Wan22Pipeline` and `add_first_frame_conditioning`",
    "toolkit_ti2v": "ai-toolkit's `Wan22Pipeline` and `add_first_frame_conditioning_v22`",
}
PLOT = ROOT / "docs/images/performance.svg"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when something is not current")
    args = parser.parse_args()
    described = openapi.document()
    wanted = {SCHEMA: schema(), OPENAPI: described, TYPES: js_types.declarations(described), PLOT: figures.plot()} | {
        path: filled(path) for path in sorted(ROOT.glob("docs/**/*.md"))
    }
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    if args.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not current; run `make docs`")
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path])
    return 0


def schema() -> str:
    """Return the JSON Schema of a job's `input`."""
    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Request.model_json_schema()}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def filled(path: Path) -> str:
    """Return the file's text with its generated parts updated."""
    parts: dict[str, Callable[[], str]] = {
        "models": partial(models, path.parent),
        "fields": fields,
        "errors": errors,
        "drafts": drafts,
        "environment": environment,
        "ratios": lambda: table(*figures.ratio_table()),
        "memory": lambda: table(*figures.memory_table()),
        "cost": lambda: table(*figures.cost_table()),
        "gpus": lambda: table(*figures.gpu_table()),
        "host": lambda: table(*figures.host_table()),
        "choose a gpu": lambda: table(*figures.gpu_choice_table()),
        "price of a video": lambda: table(*figures.video_table()),
        "quantized": lambda: table(*figures.quantized_table()),
        "stored": lambda: table(*figures.stored_table()),
    }
    parts |= {f"model {spec.id}": partial(model, spec) for spec in MODELS.values()}

    def part(match: re.Match[str]) -> str:
        return f"<!-- begin: {match[1]} -->\n{parts[match[1]]()}\n<!-- end: {match[1]} -->"

    return re.sub(r"<!-- begin: ([\w ]+) -->\n.*?<!-- end: \1 -->", part, path.read_text(), flags=re.DOTALL)


def table(*rows: tuple[str, ...]) -> str:
    head, *body = (tuple(re.sub(r"`([^`]*\|[^`]*)`", _code_with_bars, cell) for cell in row) for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, tuple("---" for _ in head), *body))


def _code_with_bars(code: re.Match[str]) -> str:
    """Return code that contains `|` as HTML: GitHub takes the bar for the end of a cell, even within backticks."""
    return f"<code>{code[1].replace('|', '&#124;')}</code>"


def models(folder: Path) -> str:
    """Return the table of models. `folder`: that of the page, where relative links start."""
    pages = posixpath.relpath((ROOT / "docs/models").as_posix(), folder.as_posix())
    rows = [
        (
            f"[`{spec.id}`]({posixpath.normpath(f'{pages}/{spec.id}.md')})",
            spec.title,
            {"none": "no", "optional": "optional", "required": "required"}[spec.control_image],
            "high and/or low" if spec.moe else "one",
            f"{spec.size_divisor} px",
            "yes" if spec.needs_toolkit else "no",
        )
        for spec in MODELS.values()
    ]
    return table(("model id", "model", "`ctrl_img`", "LoRAs", "sizes floor to", "needs ai-toolkit"), *rows)


def fields() -> str:
    rows = []
    for prefix, owner in OBJECTS.items():
        document = owner.model_json_schema()
        for name, info in owner.model_fields.items():
            default = "**required**" if info.is_required() else "" if info.default is None else f"`{json.dumps(info.default)}`"
            rows.append((f"`{prefix}{name}`", _kind(document["properties"][name]), default, info.description or ""))
    return table(("field", "type", "default", "meaning"), *rows)


def _kind(field: dict[str, Any]) -> str:
    field = field | next((kind for kind in field.get("anyOf", []) if kind.get("type") != "null"), {})
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    kind = field.get("type", "object")
    kind = {"array": "list", "integer": "int"}.get(kind, kind)
    if field.get("maximum") == 2**64 - 1:
        return f"{kind}, {field['minimum']} or more"
    return f"{kind}, {field['minimum']} to {field['maximum']}" if "maximum" in field else kind


def errors() -> str:
    return table(("code", "meaning"), *((f"`{code}`", meaning) for code, meaning in MEANING.items()))


def drafts() -> str:
    """Return the table of few-step recipes."""
    rows = []
    for spec in MODELS.values():
        if spec.draft is None:
            rows.append((f"`{spec.id}`", "none", "", "", ""))
            continue
        for lora in spec.draft.loras:
            first = {"high": 0, "low": spec.draft.low_noise_from or 0}.get(lora.side or "", 0)
            last = (spec.draft.low_noise_from or 0) if lora.side == "high" else len(spec.draft.timesteps)
            page = f"[`{lora.path}`](https://huggingface.co/{lora.repo}/blob/{lora.commit}/{lora.path})"
            steps = f"{first + 1} to {last}"
            rows.append((f"`{spec.id}`", lora.side or "the only one", steps, page, f"{lora.strength:g}"))
    return table(("model", "transformer", "steps", "distilled LoRA", "scale"), *rows)


def environment() -> str:
    rows = []
    for name, info in Settings.model_fields.items():
        if name == "lora_cache_dir":
            default = "a folder in the system's temp folder"
        elif info.is_required():
            default = "**required**"
        elif isinstance(info.default, bool):
            default = f"`{int(info.default)}`"  # as the meaning says it
        else:
            default = "" if info.default in (None, "") else f"`{info.default}`"
            if name.endswith("_bytes"):
                default += f" ({_binary(info.default)})"
        rows.append((f"`{name.upper()}`", default, info.description or ""))
    return table(("variable", "default", "meaning"), *rows)


def _binary(size: int) -> str:
    return f"{size // 1024**3} GiB" if size >= 1024**3 else f"{size // 1024**2} MiB"


def model(spec: ModelSpec) -> str:
    by_source: dict[str, list[str]] = {}
    for part, source in spec.sources.items():
        by_source.setdefault(source.repo, []).append(part)
    read_from = "; ".join(f"`{repo}` ({', '.join(parts)})" for repo, parts in by_source.items())
    frames = "`(n - 1) // 4 * 4 + 1`" if spec.drops_incomplete_frames else "`n` when it is 4n+1, else `n // 4 * 4 + 1`"
    scheduler = "as the checkpoint says" if spec.flow_shift is None else f"UniPC, flow_shift {spec.flow_shift}"
    boundary = f"boundary_ratio {spec.boundary_ratio}" if spec.boundary_ratio else "as the checkpoint says"
    rows = [
        ("weights", read_from),
        ("pipeline", PIPELINE_OF[spec.family]),
        ("control image", {"none": "none", "optional": "optional", "required": "required"}[spec.control_image]),
        ("LoRAs", "one file per side, `high` and/or `low`" if spec.moe else "one file"),
        ("width and height", f"floored to a multiple of {spec.size_divisor}"),
        ("frame count `n` becomes", frames),
        ("scheduler (`unipc`)", scheduler),
        ("scheduler (`flowmatch`)", f"FlowMatch Euler, shift {spec.trainer_shift}"),
        *([("switch between the transformers", boundary)] if spec.moe else []),
        ("[`draft`](../drafts.md)", f"{len(spec.draft.timesteps)} steps" if spec.draft else "none"),
        ("`OFFLOAD_MODE`", ", ".join(f"`{mode}`" for mode in ("auto", *spec.offload_modes))),
    ]
    return table(("", ""), *rows)


if __name__ == "__main__":
    sys.exit(main())
