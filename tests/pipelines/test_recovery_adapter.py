"""Accuracy recovery adapters beneath LoRAs: each transformer computes what it computes in the trainer, to the bit.

`trainer_runs/recovery.safetensors` has the outputs of the trainer's own classes (`quantize_model`, `LoRASpecialNetwork`), with
weights, adapters and inputs that are drawn as here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from pipelines import Adapter, WanModel, load_pipeline
from pipelines.catalog import MODELS
from pipelines.lora.file import LoraFile
from pipelines.trained import TrainedWith

THEIRS = load_file(Path(__file__).parent.parent / "trainer_runs/recovery.safetensors")
SIZE = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "num_layers": 2}
"""All inputs of the blocks' layers make groups of 64."""
PROBE = "wan21_1b, uint4, none"
"""The case that tells whether this CPU rounds as the trainer's did."""
ATTENTION = [f"{kind}_attn.{layer}" for kind in ("self", "cross") for layer in "qkvo"]
INPUTS = {"ffn.2": 128}
OUTPUTS = {"ffn.0": 128}


def drawn(shape: tuple[int, ...], seed: int, scale: float) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(torch.bfloat16)


def factors(prefix: str, layers: list[str], seed: int) -> dict[str, torch.Tensor]:
    made = {}
    for number, name in enumerate(f"blocks.{block}.{layer}" for block in range(2) for layer in layers):
        layer = name.split(".", 2)[2]
        made[f"{prefix}{name}.lora_A.weight"] = drawn((8, INPUTS.get(layer, 64)), seed + 2 * number, 0.2)
        made[f"{prefix}{name}.lora_B.weight"] = drawn((OUTPUTS.get(layer, 64), 8), seed + 2 * number + 1, 0.2)
    return made


ADAPTERS = {
    "all": factors("diffusion_model.", [*ATTENTION, "ffn.0", "ffn.2"], 1000),
    "some": factors("diffusion_model.", [*ATTENTION[:4], "ffn.2"], 2000),
    "both sides": factors("diffusion_model.transformer_1.", [*ATTENTION, "ffn.0"], 3000)
    | factors("diffusion_model.transformer_2.", [*ATTENTION, "ffn.2"], 4000),
}
LORAS = {None: 5000, "high": 6000, "low": 7000}


@pytest.fixture(scope="module")
def checkpoints(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoints with other transformers."""
    root = tmp_path_factory.mktemp("wide")
    for model_id in ("wan21_1b", "wan22_14b_t2v"):
        spec = MODELS[model_id]
        for repo in {source.repo for source in spec.sources.values()}:
            shutil.copytree(tiny / repo, root / repo)
        for number, part in enumerate(spec.transformers):
            folder = root / str(spec.sources[part])
            config = json.loads((folder / "config.json").read_text()) | SIZE
            (folder / "config.json").write_text(json.dumps(config))
            with torch.device("meta"):
                names = sorted(WanTransformer3DModel.from_config(config).state_dict().items())
            weights = {name: drawn(tuple(value.shape), 100 * number + i, 0.15) for i, (name, value) in enumerate(names)}
            save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return root


@pytest.fixture(scope="module")
def models(checkpoints: Path) -> dict[str, WanModel]:
    ids = ("wan21_1b", "wan22_14b_t2v")
    return {model_id: load_pipeline(model_id, checkpoints, "cpu", dtype=torch.bfloat16) for model_id in ids}


def written(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> LoraFile:
    save_file(tensors, folder / f"{name}.safetensors")
    return LoraFile.read(folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def tolerance(models: dict[str, WanModel], tmp_path_factory: pytest.TempPathFactory) -> float:
    """The largest difference of outputs up to 6. 0 where the probe is equal."""
    (ours,) = outputs_of(PROBE, models, tmp_path_factory.mktemp("probe"))
    return 0.0 if torch.equal(ours, THEIRS[f"{PROBE} 0"]) else 0.15


def outputs_of(case: str, models: dict[str, WanModel], folder: Path) -> list[torch.Tensor]:
    """One for each transformer."""
    model_id, qtype, beneath, *with_lora = case.split(", ")
    model = models[model_id]
    recovery = Adapter(written(folder, "recovery", ADAPTERS[beneath])) if beneath in ADAPTERS else None
    if recovery:
        model.loras.check_recovery_adapter(recovery.file)
    loras = []
    for side in (("high", "low") if model.spec.moe else (None,)) if with_lora else ():
        tensors = factors("diffusion_model.", [*ATTENTION, "ffn.0", "ffn.2"], LORAS[side])
        file = written(folder, f"lora_{side}", {key: value.float() for key, value in tensors.items()})
        loras.append(Adapter(file, 0.7, side))  # type: ignore[arg-type]
    quantization = TrainedWith(quantize=True, qtype=qtype).quantization(model.spec, None)
    model.apply_loras(loras, "beside", quantization, recovery)
    model.loras.cast_as_trainer(True)
    inputs = {"hidden_states": drawn((1, 16, 2, 4, 4), 8000, 1.0), "encoder_hidden_states": drawn((1, 7, 32), 8001, 1.0)}
    transformers = [getattr(model._pipe, part) for part in model.spec.transformers]
    with torch.no_grad():
        return [one(**inputs, timestep=torch.tensor([500]), return_dict=False)[0] for one in transformers]


@pytest.mark.parametrize("case", sorted({key.rpartition(" ")[0] for key in THEIRS}))
def test_a_transformer_over_an_adapter_computes_as_in_the_trainer(
    case: str, models: dict[str, WanModel], tolerance: float, tmp_path: Path
) -> None:
    for number, ours in enumerate(outputs_of(case, models, tmp_path)):
        assert (ours - THEIRS[f"{case} {number}"]).abs().max() <= tolerance
