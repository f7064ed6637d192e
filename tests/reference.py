"""The model pages in plain diffusers, as a second opinion: nothing here uses the worker's or the pipelines' code.

Each function loads a fresh pipeline, loads the LoRAs with `load_lora_weights`, calls it, and takes the PIL frames.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from transformers import AutoTokenizer, UMT5EncoderModel

UNIPC = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
    "time_shift_type": "exponential",
    "use_dynamic_shifting": False,
}

PLAIN = {
    "wan21_1b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan21_14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "wan21_i2v_14b": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    "wan21_i2v_14b480p": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
}


@dataclass
class Wanted:
    """A video in effective numbers: sizes and frame count as they come out."""

    prompt: str
    width: int
    height: int
    num_frames: int
    neg: str = ""
    steps: int = 3
    guidance_scale: float = 4.0
    seed: int = 42
    sampler: str = "unipc"
    image: Image.Image | None = None
    loras: list[tuple[Path, float, str | None]] = field(default_factory=list)
    """(file, scale, side)"""


def frames(model_id: str, root: Path, toolkit: Path, wanted: Wanted) -> np.ndarray:
    """uint8 [frames, height, width, 3]."""
    pipe = _load(model_id, root, toolkit)
    for path, scale, side in wanted.loras:
        low = side == "low"
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="a", load_into_transformer_2=low)
        (pipe.transformer_2 if low else pipe.transformer).set_adapters(["a"], [scale])
    if wanted.sampler == "flowmatch":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if "21" in model_id else 5.0)
    generator = torch.manual_seed(wanted.seed)
    call: dict[str, Any] = {
        "prompt": wanted.prompt,
        "negative_prompt": wanted.neg,
        "width": wanted.width,
        "height": wanted.height,
        "num_frames": wanted.num_frames,
        "num_inference_steps": wanted.steps,
        "guidance_scale": wanted.guidance_scale,
        "generator": generator,
    }
    if wanted.image is not None:
        image = wanted.image.resize((wanted.width, wanted.height), Image.LANCZOS)
        call |= {"image": image} if "21" in model_id else _conditioning(model_id, pipe, toolkit, wanted, image, generator)
    if model_id in ("wan22_5b", "wan22_14b_i2v"):
        latents = pipe(**call, output_type="latent").frames
        shape = (1, pipe.vae.config.z_dim, 1, 1, 1)
        latents = latents * torch.tensor(pipe.vae.config.latents_std).view(shape)
        video = pipe.vae.decode(latents + torch.tensor(pipe.vae.config.latents_mean).view(shape)).sample
        pictures = pipe.video_processor.postprocess_video(video.detach(), output_type="pil")[0]
    else:
        pictures = pipe(**call, output_type="pil").frames[0]
    return np.stack([np.asarray(picture) for picture in pictures])


def _load(model_id: str, root: Path, toolkit: Path) -> Any:
    if model_id in PLAIN:
        kind = WanImageToVideoPipeline if "i2v" in model_id else WanPipeline
        return kind.from_pretrained(root / PLAIN[model_id])
    if model_id == "wan22_14b_t2v":
        repo = root / "ai-toolkit/Wan2.2-T2V-A14B-Diffusers-bf16"
        pipe = WanPipeline.from_pretrained(root / "Wan-AI/Wan2.2-T2V-A14B-Diffusers", transformer=None, transformer_2=None)
        pipe.transformer = WanTransformer3DModel.from_pretrained(repo, subfolder="transformer")
        pipe.transformer_2 = WanTransformer3DModel.from_pretrained(repo, subfolder="transformer_2")
        return pipe
    if model_id == "wan22_14b_i2v":
        repo = root / "ai-toolkit/Wan2.2-I2V-A14B-Diffusers-bf16"
        text, vae = root / "ai-toolkit/umt5_xxl_encoder", AutoencoderKLWan.from_pretrained(root / "ai-toolkit/wan2.1-vae")
        second, settings, shift = "transformer_2", {"expand_timesteps": False, "boundary_ratio": 0.9}, 3.0
    else:
        repo = text = root / "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
        vae = AutoencoderKLWan.from_pretrained(repo, subfolder="vae")
        second, settings, shift = "transformer", {"expand_timesteps": True}, 5.0
    return _toolkit_module(toolkit, "extensions_built_in/diffusion_models/wan22/wan22_pipeline.py").Wan22Pipeline(
        tokenizer=AutoTokenizer.from_pretrained(text, subfolder="tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(text, subfolder="text_encoder"),
        vae=vae,
        transformer=WanTransformer3DModel.from_pretrained(repo, subfolder="transformer"),
        transformer_2=WanTransformer3DModel.from_pretrained(repo, subfolder=second),
        scheduler=UniPCMultistepScheduler(**UNIPC, flow_shift=shift),
        device=torch.device("cpu"),
        **settings,
    )


def _conditioning(model_id: str, pipe: Any, toolkit: Path, wanted: Wanted, image: Image.Image, generator: Any) -> dict:
    utils = _toolkit_module(toolkit, "toolkit/models/wan21/wan_utils.py")
    size = (wanted.height, wanted.width, wanted.num_frames)
    channels = 16 if model_id == "wan22_14b_i2v" else 48
    with torch.no_grad():
        latents = pipe.prepare_latents(1, channels, *size, torch.float32, torch.device("cpu"), generator)
        first = torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 255 * 2 - 1
        if model_id == "wan22_14b_i2v":
            return {"latents": utils.add_first_frame_conditioning(latents, first, pipe.vae)}
        latents, mask = utils.add_first_frame_conditioning_v22(latents, first, pipe.vae)
    return {"latents": latents, "noise_mask": mask}


def _toolkit_module(checkout: Path, file: str) -> ModuleType:
    """One file of a checkout under a name of its own; its `from toolkit.basic import flush` finds the checkout's."""
    basic = _module(checkout / "toolkit/basic.py", "toolkit.basic")
    before = {name: sys.modules.get(name) for name in ("toolkit", "toolkit.basic")}
    sys.modules.update({"toolkit": ModuleType("toolkit"), "toolkit.basic": basic})
    try:
        return _module(checkout / file, f"reference_{Path(file).stem}")
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
