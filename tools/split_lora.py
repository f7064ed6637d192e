"""Split a LoRA that holds the high and the low side of a Wan 2.2 14B model into one file per side.

    python -m tools.split_lora my_lora.safetensors

It writes `my_lora_high_noise.safetensors` and `my_lora_low_noise.safetensors` beside it, with the same tensors and metadata.
ai-toolkit writes such a file with `split_multistage_loras: false`. The worker accepts it as it is; other programs may not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import LoraError
from pipelines.lora.file import LoraFile
from pipelines.lora.layers import read
from pipelines.lora.names import without_side
from tools.cli import BadInput, one_line_errors


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.split_lora", description="Split a LoRA with a high and a low side into one file per side."
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="a LoRA in safetensors format")
    parser.add_argument("--to", metavar="DIR", type=Path, help="folder for the two files; default: that of FILE")
    arguments = parser.parse_args(argv)
    for path in split(arguments.file, arguments.to or arguments.file.parent):
        print(path)
    return 0


def split(source: Path, folder: Path) -> list[Path]:
    """Write the two files into `folder`. Raises BadInput, OSError."""
    from safetensors.torch import load_file, save_file  # torch takes a second to import

    try:
        file = LoraFile.read(source)
        reading = read(file)
    except LoraError as error:
        raise BadInput(f"{source}: {error}") from error
    if not reading.has_both_sides:
        raise BadInput(f"{source} holds one side: its keys name neither transformer_1 nor transformer_2")
    tensors, written = load_file(source), []
    for side, layers in reading.sides.items():
        keys = [key for layer in layers.values() for key in layer.keys.values()]
        written.append(folder / f"{source.stem}_{side}_noise.safetensors")
        save_file({without_side(key): tensors[key] for key in keys}, written[-1], dict(file.metadata))
    return written


if __name__ == "__main__":
    sys.exit(main())
