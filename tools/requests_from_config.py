"""Turn the samples of an ai-toolkit training config into requests that make the same videos.

    python -m tools.requests_from_config config.yaml --out requests

`client.training` reads the samples by the trainer's rules and makes the requests; this command writes them as files. It sends
nothing: send the files to the endpoint, then compare the videos with `tools.compare`. `python -m client from-training` does all
of it for a training's folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from client.training.requests import how_trained, model_named_by, model_of, requests_of
from client.training.samples import read_training
from pipelines.catalog import MODELS
from tools.cli import FITS, one_line_errors
from worker.image_decode import decode

_EPILOG = """\
CONFIG is the training's YAML or JSON; in the trainer's output folder it is config.yaml or .job_config.json.

Without --lora, the requests use the trainer's file names below LORA_DIR: NAME/NAME.safetensors, or for Wan 2.2 14B
NAME/NAME_high_noise.safetensors and NAME/NAME_low_noise.safetensors. To match a preview of step 1500, use the file saved at
that step: --lora NAME/NAME_000001500.safetensors. For the 14B models write high=PATH and low=PATH, unless the file names
end in _high_noise and _low_noise.

Control images are read relative to the current folder, as the trainer does, or else relative to the config's folder.

Warnings on stderr list what the trainer ignores, what cannot be matched, and values outside the schema (the nearest allowed
value is sent).

exit status: 0 written; 2 bad input

example:
  python -m tools.requests_from_config output/my_lora/config.yaml --output-format webp --out requests
  curl -H "Authorization: Bearer $RUNPOD_API_KEY" https://api.runpod.ai/v2/ENDPOINT/run -d @requests/sample_0.json
"""


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    training = read_training(args.config)
    model = args.model or model_of(training.model)
    requests, warnings = requests_of(
        training, MODELS[model], args.lora, args.config.parent, args.output_format, lambda data: decode(data, "preview")
    )
    if args.model and (named := model_named_by(training.model)) and named != args.model:
        warnings.insert(0, f"the config's model seems to be {named}; the requests are for {args.model}, as --model says")
    folder = args.out or (None if args.json else Path(f"{training.name or args.config.stem}_requests"))
    files = _written(requests, folder) if folder else []
    print("\n".join(f"warning: {text}" for text in warnings), end="\n" * bool(warnings), file=sys.stderr)
    if args.json:
        print(json.dumps(requests, indent=2, ensure_ascii=False))
    else:
        print(f"trained {how_trained(training.trained_with)}\n{as_text(requests, files)}")
    return FITS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.requests_from_config",
        description="Make a request from every sample in an ai-toolkit training config, with the trainer's own values.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="the training's config, YAML or JSON")
    parser.add_argument("--model", metavar="ID", choices=MODELS, help=f"if the config does not say which: {', '.join(MODELS)}")
    parser.add_argument("--lora", metavar="PATH", nargs="+", help="loras[].path in the requests")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder for one file per sample (default: NAME_requests; with --json: none)",
    )
    parser.add_argument(
        "--output-format",
        choices=("mp4", "webp", "gif", "png"),
        help="output_format in the requests; the previews are webp",
    )
    parser.add_argument("--json", action="store_true", help="print the requests as one JSON list")
    return parser


def _written(requests: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write one file per request, with the numbers of the trainer's previews."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = len(str(len(requests)))
    files = []
    for number, request in enumerate(requests):
        files.append(folder / f"sample_{number:0{digits}}.json")
        files[-1].write_text(json.dumps(request, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return files


def as_text(requests: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> str:
    """Return one line per request."""
    lines = [f"{file}  {_summary(request)}" for request, file in zip(requests, files, strict=True)]
    inner = requests[0]["input"]
    return "\n".join([f"{inner['model']} with {', '.join(lora['path'] for lora in inner['loras'])}", *lines])


def _summary(request: Mapping[str, Any]) -> str:
    [prompt] = request["input"]["prompts"]
    text, count = prompt["prompt"], prompt["num_frames"]
    facts = (
        f"{prompt['width']}x{prompt['height']}",
        f"{count} frame{'s' * (count > 1)} at {prompt['fps']} fps",
        f"{prompt['sample_steps']} steps",
        f"guidance {prompt['guidance_scale']:g}",
        f"seed {prompt['seed']}",
        f"LoRA x {request['input']['loras'][0]['network_multiplier']:g}",
        *(["with image"] if "ctrl_img" in prompt else []),
    )
    return f"{', '.join(facts)}: {text if len(text) <= 60 else text[:59] + '…'}"


if __name__ == "__main__":
    sys.exit(main())
