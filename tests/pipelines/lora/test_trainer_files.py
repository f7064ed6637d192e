"""Files that the trainer's own network code writes, for every option that changes them, against what that code computes.

The network is put on the transformer as in a training, given random values, saved, and run. The worker's transformer with the
saved file must give the same output.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines import Adapter, load_pipeline
from pipelines.lora.file import LoraFile
from tests.conftest import REAL_TOOLKIT
from tests.trainer import stand_in

pytestmark = pytest.mark.toolkit

LORA = {"type": "lora", "linear": 4, "linear_alpha": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "lora, alpha of another value": LORA | {"linear_alpha": 1},
    "some layers": LORA | {"kwargs": {"only_if_contains": ["attn1"]}},
    "transformer_only: false": LORA | {"transformer_only": False},
    "all_layers": LORA | {"all_layers": True},
    "all_layers, transformer_only: false": LORA | {"all_layers": True, "transformer_only": False},
    "use_bias": LORA | {"kwargs": {"use_bias": True}},
    "full_if_contains": LORA | {"kwargs": {"full_if_contains": ["attn2.to_q"]}},
    "conv": LORA | {"conv": 4, "conv_alpha": 4},
    "fullrank": {"type": "fullrank", "linear": 4, "linear_alpha": 4},
    "dora": {"type": "dora", "linear": 4, "linear_alpha": 4},
    "lokr": {"type": "lokr"},
    "lokr, factor 4": {"type": "lokr", "lokr_factor": 4},
    "lokr, ranks": {"type": "lokr", "lokr_full_rank": False, "linear": 2, "linear_alpha": 1, "lokr_factor": 2},
    "lokr, old format": {"type": "lokr", "old_lokr_format": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_of_the_trainer_does_what_the_trainers_network_does(
    name: str, dtype: torch.dtype, tiny: Path, tmp_path: Path
) -> None:
    model = load_pipeline("wan21_1b", tiny, "cpu")
    transformer = model._pipe.transformer
    plain = output_of(transformer)
    with network_of(transformer, CONFIGS[name]) as network:
        network.apply_to(None, transformer, False, True)
        randomise(network, dtype)
        network.save_weights(str(tmp_path / "lora.safetensors"), dtype=dtype)
        network.is_active = True
        network._update_torch_multiplier()
        theirs = output_of(transformer)
        for lora in network.unet_loras:
            lora.org_module[0].forward = lora.org_forward
    assert torch.equal(output_of(transformer), plain)
    assert (theirs - plain).abs().max() > 1e-3

    adapter = Adapter(LoraFile.read(tmp_path / "lora.safetensors"))
    for mode in ("adapter", "merge"):
        model.loras.check(adapter, mode)  # type: ignore[arg-type]
        model.apply_loras([adapter], mode)  # type: ignore[arg-type]
        assert torch.allclose(output_of(transformer), theirs, atol=2e-4 * float(theirs.abs().max())), mode
    model.apply_loras([])
    assert torch.equal(output_of(transformer), plain)


BESIDE = [name for name in CONFIGS if name not in ("conv", "dora", "use_bias")]


@pytest.mark.parametrize("multiplier", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("name", BESIDE)
def test_beside_the_layers_it_does_so_to_the_bit(name: str, multiplier: float, tiny: Path, tmp_path: Path) -> None:
    model = load_pipeline("wan21_1b", tiny, "cpu", dtype=torch.bfloat16)
    transformer = model._pipe.transformer
    model.loras._kept_in_float32.cast(torch.bfloat16)
    with network_of(transformer, CONFIGS[name]) as network:
        network.force_to(torch.device("cpu"), torch.float32)
        network.apply_to(None, transformer, False, True)
        randomise(network, torch.float32)
        network.save_weights(str(tmp_path / "lora.safetensors"), dtype=torch.float32)
        network.is_active = True
        network.multiplier = multiplier
        network._update_torch_multiplier()
        theirs = output_of(transformer)
        for lora in network.unet_loras:
            lora.org_module[0].forward = lora.org_forward
    adapter = Adapter(LoraFile.read(tmp_path / "lora.safetensors"), multiplier)
    model.apply_loras([adapter], "beside")
    model.loras._kept_in_float32.cast(torch.bfloat16)
    assert model.loras.mode_of(adapter, "beside") == "beside"
    assert torch.equal(output_of(transformer), theirs)


@torch.no_grad()
def output_of(transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 2, 8, 8, generator=generator).to(transformer.dtype)
    text = torch.randn(1, 8, transformer.config.text_dim, generator=generator).to(transformer.dtype)
    output: torch.Tensor = transformer(latents, torch.tensor([500]), text, return_dict=False)[0]
    return output


def randomise(network: Any, dtype: torch.dtype) -> None:
    """Random values that the saved dtype holds exactly."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator) / 16
            value.copy_((value + noise if "magnitude" in key else noise).to(dtype).float())


@contextmanager
def network_of(transformer: Any, options: dict[str, Any]) -> Iterator[Any]:
    """The trainer's `LoRASpecialNetwork`, made as its training process makes it."""
    before = dict(sys.modules)
    assert REAL_TOOLKIT is not None
    try:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("toolkit", "extensions_built_in")]:
            del sys.modules[name]
        for package in ("toolkit", "toolkit.models", "toolkit.models.wan21"):
            stand_in(package).__path__ = [str(REAL_TOOLKIT.joinpath(*package.split(".")))]
        tensor = type("Tensor", (), {})
        stand_in("optimum.quanto", QTensor=tensor, QBytesTensor=tensor)
        stand_in("torchao.dtypes", AffineQuantizedTensor=tensor)
        stand_in("torchao.quantization.quant_primitives", _DTYPE_TO_BIT_WIDTH={})
        stand_in("torchaudio")
        stand_in("toolkit.audio.album_artwork", add_album_artwork=None)
        stand_in("toolkit.prompt_utils", PromptEmbeds=None)
        stand_in("toolkit.metadata", add_model_hash_to_meta=lambda state, meta: meta)
        stand_in("toolkit.saving", get_lora_keymap_from_model_keymap=None)
        stand_in("toolkit.util.quantize", is_quantized_tensor=lambda tensor: False)
        special = importlib.import_module("toolkit.lora_special")
        config_modules = importlib.import_module("toolkit.config_modules")
        convert = importlib.import_module("toolkit.models.wan21.wan_lora_convert")
        config = config_modules.NetworkConfig(**{key: value for key, value in options.items() if key != "kwargs"})
        base_model = Wan(convert)
        yield special.LoRASpecialNetwork(
            text_encoder=None,
            unet=transformer,
            lora_dim=config.linear,
            multiplier=1.0,
            alpha=config.linear_alpha,
            train_unet=True,
            train_text_encoder=False,
            conv_lora_dim=config.conv,
            conv_alpha=config.conv_alpha,
            network_config=config,
            network_type=config.type,
            transformer_only=config.transformer_only,
            is_transformer=True,
            base_model=base_model,
            target_lin_modules=["WanTransformer3DModel"],
            target_conv_modules=["WanTransformer3DModel"],
            **options.get("kwargs", {}),
        )
    finally:
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0] in ("toolkit", "optimum", "torchao", "torchaudio"):
                del sys.modules[name]
        sys.modules.update(before)


class Wan(SimpleNamespace):
    """What the network asks of the trainer's Wan model. A file of the old LoKr format is one that the model lets through."""

    use_old_lokr_format = True

    def __init__(self, convert: Any) -> None:
        super().__init__(convert=convert)

    def get_transformer_block_names(self) -> list[str]:
        return ["blocks"]

    def convert_lora_weights_before_save(self, state: Any) -> Any:
        return self.convert.convert_to_original(state)
