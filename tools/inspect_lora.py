"""Says what a LoRA file is: which models it fits, which trainer made it, and how that trainer sampled.

    python -m tools.inspect_lora my_lora.safetensors --model wan22_14b_t2v

It reads the header and the checksum, so it needs no model, no GPU and no torch. With `--values` it also reads the numbers:
whether they are finite, which layers do nothing, and how large the changes are. With `--checkpoint` it compares the changes
with the model's weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from client.training.requests import limits
from pipelines.catalog import MODELS, ModelSpec
from pipelines.errors import LoraError, LoraInvalid
from pipelines.lora.file import Adapter, LoraFile
from pipelines.lora.fit import check, hints, mode_for, side_in_name
from pipelines.lora.layers import Layer, Reading, read
from pipelines.lora.names import Side
from pipelines.lora.origin import fitting_models, widths_of
from pipelines.lora.shapes import shapes_of
from pipelines.recipes import FLOWMATCH_SINCE, era_of, preview
from pipelines.trained import TrainedWith
from tools.cli import DIFFERS, FITS, BadInput, one_line_errors
from worker.training import NOT_KNOWN, KnownTraining, read_config

_EPILOG = """\
exit status: 0 it fits (the model given, or any); 1 it does not; 2 bad input

example:
  python -m tools.inspect_lora loras/my_lora/my_lora_high_noise.safetensors --model wan22_14b_t2v
  python -m tools.inspect_lora boat.safetensors --checkpoint checkpoints/Wan-AI/Wan2.1-T2V-1.3B-Diffusers
"""

_SOLVERS = {"unipc": "UniPC", "flowmatch": "FlowMatch Euler"}


@dataclass(frozen=True)
class Inspection:
    """A file, and what the worker reads in it."""

    file: LoraFile
    reading: Reading | None
    """None for a file that the worker refuses for every model."""
    refusal: str
    """Why the worker refuses the file for every model."""

    @property
    def layers(self) -> list[Layer]:
        return self.reading.all_layers if self.reading else []

    @property
    def kind(self) -> str:
        """How the file changes weights."""
        if not self.reading:
            return "not a LoRA that the worker reads"
        kinds = {"lora": "LoRA", "lokr": "LoKr", "full": "differences"}
        found = sorted({"DoRA" if "magnitude" in layer.keys else kinds[layer.kind] for layer in self.layers})
        return " and ".join(found) + (", high and low side in one file" if self.reading.has_both_sides else "")

    @cached_property
    def widths(self) -> list[int]:
        return widths_of(self.file)

    @cached_property
    def fitting(self) -> list[str]:
        """Ids of the models whose worker accepts the file."""
        return [id for id in fitting_models(self.file) if not misfits(self, MODELS[id])]

    @cached_property
    def training(self) -> KnownTraining:
        """How the training ran, from the config.yaml beside the file."""
        config = self.file.path.with_name("config.yaml")
        return read_config(config, self.file.path) if config.is_file() else NOT_KNOWN

    @property
    def side(self) -> Side | None:
        """`high` or `low`, from the file's name."""
        return side_in_name(self.file.path.stem)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    found = inspect(args.file)
    spec = MODELS[args.model] if args.model else None
    values = _values(found, args.checkpoint) if (args.values or args.checkpoint) and found.reading else None
    if args.json:
        print(json.dumps(as_json(found, spec) | ({"values": values} if values else {}), indent=2))
    else:
        print("\n".join([as_text(found, spec), *(_values_as_text(values) if values else [])]))
    fits = not misfits(found, spec) if spec else bool(found.fitting)
    return FITS if fits else DIFFERS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.inspect_lora",
        description="Say what a LoRA file is, which models it fits, and how its trainer made the previews.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="a LoRA in safetensors format")
    parser.add_argument("--model", metavar="ID", choices=MODELS, help=f"say whether it fits this one of {', '.join(MODELS)}")
    parser.add_argument("--values", action="store_true", help="also read the numbers: finite, dead layers, size of the changes")
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        help="the model's folder: compare the changes with its weights, layer by layer (implies --values)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def inspect(path: Path) -> Inspection:
    """Read the header of `path`. Raises BadInput, OSError."""
    path.stat()
    if path.is_dir():
        raise BadInput(f"{path} is a folder; name the .safetensors file in it")
    try:
        file = LoraFile.read(path)
    except LoraInvalid as error:
        raise BadInput(f"{path}: {error}") from error
    try:
        return Inspection(file, read(file), "")
    except LoraError as error:
        return Inspection(file, None, str(error))


def misfits(found: Inspection, spec: ModelSpec) -> list[str]:
    """Return why the worker of `spec` refuses the file, in the worker's words; empty if it accepts it."""
    try:
        check(found.file, spec, shapes_of(spec.id))
    except LoraError as error:
        return [str(error)]
    return []


def notes(found: Inspection, spec: ModelSpec | None) -> list[str]:
    """Return what a person should know before using the file."""
    specs = [spec] if spec else [MODELS[id] for id in found.fitting]
    texts = []
    if found.reading and specs:
        texts += [why for _, why in [mode_for(found.reading, "adapter", shapes_of(specs[0].id))] if why]
    if spec and found.reading and not misfits(found, spec):
        texts += hints(Adapter(found.file, side=found.side), spec, found.reading)
    if any(spec.moe for spec in specs) and not (found.reading and found.reading.has_both_sides):
        texts.append(
            f'send it as the {found.side} side: "transformer": "{found.side}"'
            if found.side
            else "its name does not say high or low, so its side is unknown"
        )
    if len([spec for spec in specs if spec.moe]) > 1:
        texts.append("Wan 2.2 14B T2V and I2V have the same layers: the file cannot tell which of them it was trained on")
    if found.file.trigger_word:
        texts.append(f"it was trained with the trigger word {found.file.trigger_word!r}; write it in the prompt")
    return texts


def sampling(found: Inspection, spec: ModelSpec) -> str:
    """Return in words how the trainer made its previews for `spec`."""
    era, why = era_of([found.file])
    recipe = preview(spec, era, why)
    boundary = f", boundary {recipe.boundary_ratio}" if recipe.boundary_ratio else ""
    return f"{_SOLVERS[recipe.solver]}, shift {recipe.shift:g}{boundary}"


def as_json(found: Inspection, spec: ModelSpec | None) -> dict[str, Any]:
    """Return everything as data; `model`, `fits_model` and `why_not` only if a model was given."""
    file = found.file
    era, why = era_of([file])
    report: dict[str, Any] = {
        "file": file.path.name,
        "fits": found.fitting,
        "kind": found.kind,
        "ranks": sorted({layer.rank for layer in found.layers if layer.rank}),
        "keys": len(file.shapes),
        "layers": len(found.layers),
        "blocks": file.num_blocks,
        "hidden_size": found.widths[0] if len(found.widths) == 1 else None,
        "image_keys": file.has_image_keys,
        "side": found.side,
        "dtypes": sorted(set(file.dtypes.values())),
        "base_model_version": file.base_version or None,
        "trainer": file.entry("software").get("name"),
        "trainer_version": file.trainer_version or None,
        "era": era,
        "era_because": why,
        "step": file.training_step,
        "epoch": file.entry("training_info").get("epoch"),
        "trigger_word": file.trigger_word or None,
        "bytes": file.path.stat().st_size,
        "sha256": file.sha256,
        "trained_with": found.training.trained.as_words() or None,
        "refusal": found.refusal or None,
        "notes": notes(found, spec),
    }
    if spec:
        why_not = misfits(found, spec)
        report |= {"model": spec.id, "fits_model": not why_not, "why_not": why_not}
    return report


def as_text(found: Inspection, spec: ModelSpec | None) -> str:
    """Return the same as text, one fact per line."""
    facts = as_json(found, spec)
    counted = Counter(f"{layer.rank or 'full'}" for layer in found.layers)
    ranks = ", ".join(rank + f" ({count} layers)" * (len(counted) > 1) for rank, count in counted.items())
    width = " and ".join(map(str, found.widths)) or "unknown"
    lines = {
        "file": facts["file"],
        "fits": ", ".join(facts["fits"]) or "none of the models",
        "kind": f"{facts['kind']}, rank {ranks or 'unknown'}",
        "keys": f"{facts['keys']} in {facts['layers']} layers of {facts['blocks']} blocks, {' and '.join(facts['dtypes'])}",
        "width": width + ", with image keys" * facts["image_keys"],
        "side": facts["side"],
        "base model": facts["base_model_version"] or "not noted",
        "trainer": f"{facts['trainer'] or 'not noted'} {facts['trainer_version'] or ''}".strip(),
        "previews": _previews(found, spec),
        "training": _training(found.training.trained) or found.training.warning,
        "match": _match(found.training.trained),
        "step": None if facts["step"] is None else f"{facts['step']}, epoch {facts['epoch']}",
        "trigger": facts["trigger_word"],
        "refused": facts["refusal"],
        "size": f"{facts['bytes'] / 1e6:.1f} MB",
        "sha256": facts["sha256"],
    }
    text = [f"{name:<11} {value}" for name, value in lines.items() if value is not None]
    text += [f"{'note':<11} {note}" for note in facts["notes"]]
    if spec:
        text += ["", f"It fits {spec.id}." if facts["fits_model"] else f"It does not fit {spec.id}:"]
        text += [f"  - {reason}" for reason in facts["why_not"]]
    return "\n".join(text)


def _previews(found: Inspection, spec: ModelSpec | None) -> str:
    era, why = era_of([found.file])
    since = ".".join(map(str, FLOWMATCH_SINCE))
    when = f"{'from' if era == 'flowmatch' else 'before'} {since}"
    ways: dict[str, list[str]] = {}
    for id in [spec.id] if spec and spec.id in found.fitting else found.fitting:
        ways.setdefault(sampling(found, MODELS[id]), []).append(id)
    how = "; ".join(way + (f" ({', '.join(ids)})" if len(ways) > 1 else "") for way, ids in ways.items())
    return f"{how or _SOLVERS[era]} (trainer {when}; {why})"


def _training(trained: TrainedWith) -> str | None:
    """Return what decides the previews, in the config's own words."""
    words = trained.as_words()
    values = [f"{name} {words[name]}" for name in ("qtype", "dtype", "save_dtype") if words.get(name)]
    mixed = ["several multipliers"] * (trained.multipliers == "mixed")
    return (", ".join([*trained.kinds, *values, *mixed]) or "not quantized") if words else None


def _match(trained: TrainedWith) -> str | None:
    """Return how close a video with `match` preview gets to the samples; None where it is not known how the training ran."""
    if not trained.as_words():
        return None
    return "; ".join(limits(trained)) or "with `match` preview exact, on the same kind of device"


def _values(found: Inspection, checkpoint: Path | None) -> dict[str, Any]:
    """Return the changes by layer at network_multiplier 1. Raises BadInput, as `changes_of` does."""
    from tools.lora_values import changes_of  # it needs torch

    changes = changes_of(found.file, checkpoint)
    return {
        "finite": True,  # anything else is bad input
        "dead_layers": [change.layer for change in changes if change.is_dead],
        "layers": [asdict(change) for change in changes],
    }


def _values_as_text(values: Mapping[str, Any]) -> list[str]:
    layers, dead = values["layers"], values["dead_layers"]
    which = f", such as {dead[0]}" if dead else ""
    lines = ["", "values      all are finite numbers", f"dead        {len(dead)} of {len(layers)} layers change nothing{which}"]
    compared = any(layer["strength"] is not None for layer in layers)
    key, what = ("strength", "of the weight's norm") if compared else ("norm", "(norm of the change)")
    known = sorted((layer for layer in layers if layer[key] is not None), key=lambda layer: -layer[key])
    if not known:
        return [*lines, "strength    a DoRA's change depends on the weights; add --checkpoint"]
    middle = known[len(known) // 2]
    for name, layer in (("strongest", known[0]), ("median", middle), ("weakest", known[-1])):
        shown = f"{layer[key]:.2%}" if compared else f"{layer[key]:.3g}"
        lines.append(f"{name:<11} {shown} {what}: {layer['layer']}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
