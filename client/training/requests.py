"""Makes requests from the samples of a training config: one for each, with the trainer's own values.

It sends nothing, and reads no file but the control images.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from client.errors import BadInput
from client.request import MAX_PAYLOAD, body_of
from client.training.samples import RANDOM_SEED, Sample, TrainingConfig
from pipelines.catalog import MODELS, ModelSpec
from pipelines.trained import QTYPES, TrainedWith, other_base_model
from worker.errors import WorkerError
from worker.parse import parse
from worker.request import Lora, Prompt


def model_of(model: Mapping[str, Any]) -> str:
    """Return the model id of a config's `model` section. Raises BadInput if the section does not say which."""
    named = model_named_by(model)
    if not named:
        shown = f"arch {model.get('arch')!r} and name_or_path {model.get('name_or_path')!r}"
        raise BadInput(f"{shown} do not say which model it is; add --model with one of {', '.join(MODELS)}")
    return named


def model_named_by(model: Mapping[str, Any]) -> str | None:
    """Return the model id that `arch` and `name_or_path` name, or None. The UI adds a size to the arch, such as `wan21:1b`."""
    arch, _, tag = str(model.get("arch") or "").partition(":")
    single = {"wan22_14b": "wan22_14b_t2v", "wan22_14b_i2v": "wan22_14b_i2v", "wan22_5b": "wan22_5b"}
    if arch in single:
        return single[arch]
    sizes = {
        "wan21": {r"1(\.3)?b": "wan21_1b", r"14b": "wan21_14b"},
        "wan21_i2v": {r"480p": "wan21_i2v_14b480p", r"720p|\A14b": "wan21_i2v_14b"},
    }.get(arch, {})
    # The trainer loads the name and ignores the size after the arch, so that size counts only if the name has none.
    for text in (str(model.get("name_or_path") or ""), tag):
        ids = [id for pattern, id in sizes.items() if re.search(rf"(?<!\d)(?:{pattern})(?![a-z\d])", text, re.IGNORECASE)]
        if len(ids) == 1:
            return ids[0]
    return None


def requests_of(
    training: TrainingConfig,
    spec: ModelSpec,
    paths: Sequence[str] | None,
    folder: Path,
    output_format: str | None = None,
    check_image: Callable[[bytes], object] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """(one request per sample, warnings). Every request is checked against the schema. Raises BadInput, OSError.

    `folder`: where relative paths of control images are looked for, after the current folder. `check_image` raises
    ValueError for an image file that cannot be read.
    """
    loras = _loras(spec, paths, training)
    warnings = [*training.warnings, *limits(training.trained_with)]
    if training.trained_with.draws_noise_in_bf16(spec):
        warnings.append(
            "model.low_vram: with it ai-toolkit draws the noise of Wan 2.1 image-to-video in bf16, and the worker in float32, "
            "so the previews differ by 0.9 to 1.3 of 255 on average (ai-toolkit 0.12.26 stops at the first preview)"
        )
    if other := other_base_model(training.model, spec):
        warnings.append(
            f"model.name_or_path: the worker loads {spec.sources['transformer'].repo}; if {other} are other weights, such as "
            "a finetune, the previews differ visibly"
        )
    trained = training.trained_with.as_words()
    if training.trained_with.format not in QTYPES:  # a warning says so
        trained = {name: value for name, value in trained.items() if name not in ("quantize", "quantize_te", "qtype")}
        if not training.trained_with.merges:
            trained["multipliers"] = "mixed"  # the trainer does not merge on quantized weights
    requests = []
    for number, sample in enumerate(training.samples):
        warnings += sample.warnings
        where = f"sample {number}"
        multiplier = _allowed(Lora, "network_multiplier", sample.network_multiplier, where, warnings)
        inner: dict[str, Any] = {
            "model": spec.id,
            "match": "preview",
            "trained_with": trained,
            "loras": [{**lora, "network_multiplier": multiplier} for lora in loras],
            "prompts": [_prompt(sample, spec, where, folder, warnings, check_image)],
        }
        if output_format:
            inner["output_format"] = output_format
        try:
            parse(inner, spec)
        except WorkerError as error:
            raise BadInput(f"{where}: the worker would reject its request: {error}") from error
        requests.append({"input": inner})
        if (size := len(body_of(requests[-1]))) > MAX_PAYLOAD:
            limit = f"RunPod accepts {MAX_PAYLOAD / 1e6:.0f} MB at /run"
            warnings.append(f"{where}: the request has {size / 1e6:.1f} MB with its image, and {limit}; use a URL")
    return requests, warnings


def _loras(spec: ModelSpec, paths: Sequence[str] | None, training: TrainingConfig) -> list[dict[str, Any]]:
    if not spec.moe:
        return [{"path": path} for path in paths or [f"{_name(training)}/{training.name}.safetensors"]]
    kwargs = training.model.get("model_kwargs")
    trained = kwargs if isinstance(kwargs, dict) else {}
    sides = [side for side in ("high", "low") if trained.get(f"train_{side}_noise", True)]
    if not training.splits_sides and (paths is None or (len(paths) == 1 and not re.match("(high|low)=", paths[0]))):
        # A file that holds both sides is applied to both, whichever it is sent as.
        return [{"path": paths[0] if paths else f"{_name(training)}/{training.name}.safetensors", "transformer": sides[0]}]
    if paths:
        return [_sided(path) for path in paths]
    return [{"path": f"{_name(training)}/{training.name}_{side}_noise.safetensors", "transformer": side} for side in sides]


def _name(training: TrainingConfig) -> str:
    if not training.name:
        raise BadInput("the config has no name, and so the LoRA's file is unknown; give it with --lora")
    return training.name


def _sided(path: str) -> dict[str, Any]:
    """Return an item of `loras` from `high=PATH`, or from a path that ends as the trainer's files do."""
    if match := re.match(r"(high|low)=(.+)", path):
        return {"path": match[2], "transformer": match[1]}
    if match := re.search(r"_(high|low)_noise(\.safetensors)?([?#].*)?$", path):
        return {"path": path, "transformer": match[1]}
    raise BadInput(f"{path} does not say which side it is for; write high={path} or low={path}")


def how_trained(trained: TrainedWith) -> str:
    """Return what of the training decides its samples, in the config's words."""
    if not trained.kinds:
        return f"in {trained.dtype or 'the default dtype'}, not quantized"
    of = f" as {trained.format}" if trained.is_quantized or trained.quantizes_text_encoder else ""
    return f"with {', '.join(trained.kinds)}{of}; the worker computes in the same way"


def limits(trained: TrainedWith) -> list[str]:
    """Return warnings about settings of the config that the worker cannot reproduce exactly."""
    texts = []
    if trained.qtype and trained.format not in QTYPES:
        known = ", ".join(QTYPES)
        texts.append(
            f"model.qtype: {trained.format} cannot be rebuilt by the worker (it knows {known}), so the previews differ visibly"
        )
    if trained.saves_in in ("float16", "bfloat16"):
        texts.append(
            f"save.dtype: {trained.save_dtype} rounds the LoRA, so the match is close, but not exact; float32 removes this"
        )
    if trained.computes_in == "float16":
        texts.append(
            f"train.dtype: {trained.dtype} is a dtype that no worker computes in, so the previews differ by 1.5 to 2.2 of 255 "
            "on average, and on a worker with DTYPE=float32 by 0.2 to 1.0"
        )
    if trained.merges and trained.computes_in == "bfloat16":
        texts.append(
            f"train.dtype: {trained.dtype} without quantization: from the second sampling round on, the trainer's "
            "own weights had drifted; the first round can be matched exactly"
        )
    return texts


def _prompt(
    sample: Sample,
    spec: ModelSpec,
    where: str,
    folder: Path,
    warnings: list[str],
    check_image: Callable[[bytes], object] | None,
) -> dict[str, Any]:
    """Return an item of `prompts`. It has every number, since the trainer's defaults differ from the worker's."""
    if sample.seed == RANDOM_SEED:
        warnings.append(f"{where}: its seed is -1, so the trainer drew one and did not save it; the preview cannot be matched")
    numbers = {
        name: _allowed(Prompt, name, getattr(sample, name), where, warnings)
        for name in ("width", "height", "num_frames", "fps", "sample_steps", "guidance_scale", "seed")
    }
    prompt: dict[str, Any] = {"prompt": sample.prompt, "neg": sample.neg, **numbers}
    if sample.ctrl_img and spec.control_image == "none":
        warnings.append(f"{where}: `ctrl_img` is not sent, since it has no effect on {spec.id}, as in the trainer")
    elif sample.ctrl_img:
        prompt["ctrl_img"] = _inlined(sample.ctrl_img, folder, where, check_image)
    elif spec.control_image == "required":
        raise BadInput(f"{where} has no `ctrl_img`, which {spec.id} needs; the trainer fails there too")
    return prompt


def _allowed(model: type[Lora | Prompt], name: str, value: Any, where: str, warnings: list[str]) -> Any:
    """Return the value, or with a warning the nearest one that the schema allows."""
    rule = model.model_json_schema()["properties"][name]
    rule = rule | next((kind for kind in rule.get("anyOf", []) if "maximum" in kind), {})
    nearest = min(max(value, rule["minimum"]), rule["maximum"])
    if nearest != value:
        warnings.append(f"{where}: {name} {value:g} is outside the worker's limits; {nearest:g} is sent")
    return type(value)(nearest)


def _inlined(source: str, folder: Path, where: str, check: Callable[[bytes], object] | None) -> str:
    """Return the image file as base64. With `preview`, the worker decodes it as the trainer does. Raises BadInput, OSError."""
    name = PurePosixPath(source.replace("\\", "/")).name  # of the training's machine, where the folder lay elsewhere
    path = next((path for path in (Path(source), folder / source, folder / name) if path.is_file()), None)
    if path is None:
        raise BadInput(
            f"{where}: there is no control image {source}, neither in the current folder nor in the config's; put it there"
        )
    data = path.read_bytes()
    try:
        if check:
            check(data)
    except ValueError as error:
        raise BadInput(f"{where}: the control image {source} cannot be read: {error}") from error
    return base64.b64encode(data).decode()
