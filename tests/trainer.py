"""ai-toolkit's own way to a sample, from a real checkout: its model classes, pipelines and `generate_single_image`.

The trainer's model files are run as they are. What they import for training (quantization, data loading, torchvision) is
replaced by empty stand-ins, and a model object is put together from tiny checkpoints instead of by its loader.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, UMT5EncoderModel

from pipelines.catalog import MODELS
from pipelines.image_processor import TensorImageProcessor
from tests.reference import Wanted

_MODEL_CLASSES = {
    "wan21_1b": ("toolkit.models.wan21.wan21", "Wan21"),
    "wan21_14b": ("toolkit.models.wan21.wan21", "Wan21"),
    "wan21_i2v_14b": ("toolkit.models.wan21.wan21_i2v", "Wan21I2V"),
    "wan21_i2v_14b480p": ("toolkit.models.wan21.wan21_i2v", "Wan21I2V"),
    "wan22_14b_t2v": ("extensions_built_in.diffusion_models.wan22.wan22_14b_model", "Wan2214bModel"),
    "wan22_14b_i2v": ("extensions_built_in.diffusion_models.wan22.wan22_14b_i2v_model", "Wan2214bI2VModel"),
    "wan22_5b": ("extensions_built_in.diffusion_models.wan22.wan22_5b_model", "Wan225bModel"),
}

_NAMESPACES = (
    "toolkit",
    "toolkit.models",
    "toolkit.models.wan21",
    "toolkit.samplers",
    "extensions_built_in",
    "extensions_built_in.diffusion_models",
    "extensions_built_in.diffusion_models.wan22",
)

_STAND_INS = {
    "optimum.quanto": "freeze qfloat8 QTensor qint4",
    "toolkit.accelerator": "unwrap_model",
    "toolkit.config_modules": "GenerateImageConfig ModelConfig ModelArch",
    "toolkit.data_transfer_object.data_loader": "DataLoaderBatchDTO",
    "toolkit.dequantize": "patch_dequantization_on_save",
    "toolkit.memory_management": "MemoryManager",
    "toolkit.memory_management.manager": "MemoryManager",
    "toolkit.models.loaders.umt5": "get_umt5_encoder",
    "toolkit.timestep_weighing.default_weighing_scheme": "default_weighing_scheme",
    "toolkit.util.quantize": "quantize get_qtype quantize_model",
}


class _BaseModel:
    """The few things of the trainer's BaseModel that sampling uses."""

    @property
    def unet(self) -> Any:
        return self.model

    transformer = unet


class _PromptEmbeds:
    def __init__(self, text_embeds: torch.Tensor) -> None:
        self.text_embeds = text_embeds


def sample(model_id: str, root: Path, toolkit: Path, wanted: Wanted, era: str, dtype: torch.dtype, folder: Path) -> np.ndarray:
    """What the trainer shows for this sample: uint8 [frames, height, width, 3]. LoRAs are merged by its rule."""
    with _imported(toolkit, model_id) as (model_class, module), torch.no_grad():
        model = _assemble(model_id, root, model_class, module, dtype)
        if era == "unipc":
            _as_before_0_9_3(model, module)
        for path, scale, side in wanted.loras:
            _merge(_side(model, side), load_file(path), scale)
        control_image = None
        if wanted.image is not None:
            control_image = folder / "control.png"
            wanted.image.save(control_image)
        config = SimpleNamespace(
            width=wanted.width,
            height=wanted.height,
            num_frames=wanted.num_frames,
            num_inference_steps=wanted.steps,
            guidance_scale=wanted.guidance_scale,
            latents=None,
            ctrl_img=control_image,
        )
        positive, negative = (model.get_prompt_embeds(text) for text in (wanted.prompt, wanted.neg))
        pipeline = model.get_generation_pipeline()
        torch.manual_seed(wanted.seed)
        generator = torch.manual_seed(wanted.seed)
        images = model.generate_single_image(pipeline, config, positive, negative, generator, {})
    images = images if isinstance(images, list) else [images]
    return np.stack([np.asarray(image) for image in images])


def _assemble(model_id: str, root: Path, model_class: Any, module: ModuleType, dtype: torch.dtype) -> Any:
    sources = MODELS[model_id].sources

    def part(name: str, kind: Any) -> Any:
        source = sources[name]
        loaded = kind.from_pretrained(root / source.repo, subfolder=source.subfolder, dtype=dtype)
        return loaded.to(dtype=dtype)

    model = model_class.__new__(model_class)
    model.device_torch, model.torch_dtype = torch.device("cpu"), dtype
    model.model_config = SimpleNamespace(low_vram=False, model_kwargs={})
    model.vae, model.text_encoder = part("vae", AutoencoderKLWan), part("text_encoder", UMT5EncoderModel)
    model.text_encoder.set_attn_implementation("eager")  # all that the trainer's own transformers has
    model.tokenizer = AutoTokenizer.from_pretrained(root / sources["tokenizer"].repo, subfolder="tokenizer")
    transformers = [part(name, WanTransformer3DModel) for name in ("transformer", "transformer_2") if name in sources]
    model.model = transformers[0]
    if len(transformers) == 2:
        model.model = SimpleNamespace(transformer_1=transformers[0], transformer_2=transformers[1])
    if model_id.startswith("wan22"):
        for transformer in transformers:
            embedder = transformer.condition_embedder
            patch = sys.modules["extensions_built_in.diffusion_models.wan22.wan22_5b_model"].time_text_monkeypatch
            embedder.forward = partial(patch, embedder)
    if "image_encoder" in sources:
        repo = root / sources["image_encoder"].repo
        model.image_encoder = part("image_encoder", CLIPVisionModel)
        processor = CLIPImageProcessor.from_pretrained(repo, subfolder="image_processor")
        model.image_processor = TensorImageProcessor(processor)  # it has torchvision; tests/trainer_runs has its pixels
    model.pipeline = WanPipeline(
        tokenizer=model.tokenizer, text_encoder=model.text_encoder, vae=model.vae, scheduler=model.get_train_scheduler()
    )
    return model


def _as_before_0_9_3(model: Any, module: ModuleType) -> None:
    """The one line that the trainer's authors left behind as a comment: UniPC from the model's own config."""
    config = getattr(module, "scheduler_configUniPC", model._wan_generation_scheduler_config)
    model.get_train_scheduler = lambda: UniPCMultistepScheduler(**config)


def _side(model: Any, side: str | None) -> Any:
    return {
        None: model.model,
        "high": getattr(model.model, "transformer_1", None),
        "low": getattr(model.model, "transformer_2", None),
    }[side]


def _merge(transformer: Any, tensors: dict[str, torch.Tensor], scale: float) -> None:
    """float32 product added to the float32 weight, stored in its own dtype; names converted by hand."""
    names = {"self_attn": "attn1", "cross_attn": "attn2", "ffn": "ffn"}
    parts = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "k_img": "add_k_proj", "v_img": "add_v_proj"}
    parts |= {"0": "net.0.proj", "2": "net.2"}
    for key, down in tensors.items():
        if key.endswith("lora_A.weight"):
            _, _, block, group, part, *_ = key.split(".")
            weight = transformer.get_submodule(f"blocks.{block}.{names[group]}.{parts[part]}").weight
            up = tensors[key.replace("lora_A", "lora_B")]
            weight.data = (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)


@contextmanager
def _imported(checkout: Path, model_id: str) -> Iterator[tuple[Any, ModuleType]]:
    before = dict(sys.modules)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("toolkit", "extensions_built_in")]:
        del sys.modules[name]
    try:
        for name in _NAMESPACES:
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(checkout.joinpath(*name.split(".")))]
        for name, contents in _STAND_INS.items():
            stand_in(name, **{content: type(content, (), {}) for content in contents.split()})
        stand_in("toolkit.models.base_model", BaseModel=_BaseModel)
        stand_in("toolkit.prompt_utils", PromptEmbeds=_PromptEmbeds)
        if "torchvision" not in sys.modules:
            functional = stand_in("torchvision.transforms.functional", to_tensor=_to_tensor)
            stand_in("torchvision.transforms", functional=functional)
        module_name, class_name = _MODEL_CLASSES[model_id]
        module = importlib.import_module(module_name)
        yield getattr(module, class_name), module
    finally:
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0] in ("toolkit", "extensions_built_in", "torchvision", "optimum"):
                del sys.modules[name]
        sys.modules.update(before)


def stand_in(name: str, **contents: Any) -> ModuleType:
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if parent not in sys.modules:
            sys.modules[parent] = ModuleType(parent)
            sys.modules[parent].__path__ = []
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(contents)
    return module


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """torchvision's: [3, H, W] in 0..1, float32."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
