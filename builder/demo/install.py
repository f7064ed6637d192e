"""Write the trained tiny weights in the layout of the checkpoints of the text-to-video models.

    python -m builder.demo.install ROOT

The result is `ROOT/ORG/NAME` for every Hub repo that the T2V models of pipelines/catalog.py and ai-toolkit read, and
`ROOT/loras/striped_sail`, the folder that ai-toolkit wrote when it trained a LoRA for `wan22_14b_t2v`. All models, and both
transformers of 2.2, are the same weights. They differ only in how they are sampled.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from builder.tiny_checkpoints import write_index
from pipelines.catalog import MODELS, ModelSpec

WEIGHTS = Path(__file__).parent / "weights"
TRAINED = Path(__file__).parent / "trained"
PARTS_OF_THE_TRAINER = ("vae", "text_encoder", "tokenizer")
"""For Wan 2.2 14B, ai-toolkit reads these from repos of its own, which `wan22_14b_i2v` has in common with it."""
MODEL_IDS = tuple(spec.id for spec in MODELS.values() if spec.family == "t2v")


def install(root: Path) -> None:
    """Write the repos and the LoRAs below `root`, and overwrite what exists."""
    for model_id in MODEL_IDS:
        _install_model(MODELS[model_id], root)
    for part in PARTS_OF_THE_TRAINER:
        source = MODELS["wan22_14b_i2v"].sources[part]
        _copy_part(part, root / source.repo / source.subfolder)
    shutil.copytree(TRAINED, root / "loras", dirs_exist_ok=True)


def _install_model(spec: ModelSpec, root: Path) -> None:
    for part, source in spec.sources.items():
        _copy_part(part, root / source.repo / source.subfolder)
    base = root / spec.sources["vae"].repo
    for part in spec.transformers:  # 2.2: beside those that the worker reads, for plain diffusers
        _copy_part(part, base / part)
    write_index(base, "WanPipeline", **({"boundary_ratio": 0.875} if spec.moe else {}))


def _copy_part(part: str, to: Path) -> None:
    for file in (WEIGHTS / part.removesuffix("_2")).iterdir():
        _copy_file(file, to / file.name)


def _copy_file(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m builder.demo.install", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder to write ROOT/ORG/NAME and ROOT/loras into")
    root = parser.parse_args().root
    install(root)
    print(f"demo checkpoints of {', '.join(MODEL_IDS)} and a LoRA in {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
