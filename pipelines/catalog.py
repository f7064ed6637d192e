"""The seven models as data. Adding a model starts here. No torch in this file.

Sources: the model pages of the ids, and for the trainer's own sampling ai-toolkit 0.12.26.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

OffloadMode = Literal["auto", "none", "text_encoder", "group", "model", "sequential"]
"""See OFFLOAD."""
Family = Literal["t2v", "i2v", "toolkit_i2v", "toolkit_ti2v"]
"""Which pipeline a model runs on: diffusers' own (`diffusers_models`), or ai-toolkit's (`toolkit_models`)."""
Attention = Literal["auto", "native", "cudnn", "flash", "flash3"]
Sampler = Literal["unipc", "flowmatch"]
Match = Literal["documented", "preview"]
"""What a video is made to match: the model page, or the samples of the trainer."""
Quantize = Literal["none", "auto", "qfloat8", "float8", "int8", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7"]
"""How a worker keeps its weights; see `load_pipeline`."""
LoraMode = Literal["adapter", "merge", "beside"]
"""`adapter`: beside the weights, as diffusers does. `merge`: added into them, as the trainer does for its samples. `beside`: in
float32 beside them, as the trainer does where it cannot merge."""


@dataclass(frozen=True)
class Offload:
    """What an offload mode does with the weights, and what goes with it."""

    streamed: tuple[str, ...] | None
    """Components that wait in main memory and are brought to the device piece by piece. None: all are moved, by accelerate."""
    can_merge: bool = True
    """Whether LoRAs can be merged into the weights."""
    can_compile: bool = True


OFFLOAD: Mapping[OffloadMode, Offload] = MappingProxyType(
    {
        "none": Offload(streamed=()),
        "text_encoder": Offload(streamed=("text_encoder",)),  # layer by layer, for a text that is new
        "group": Offload(streamed=("text_encoder", "transformer", "transformer_2"), can_compile=False),  # block by block
        "model": Offload(streamed=None),  # one component at a time is on the device
        "sequential": Offload(streamed=None, can_merge=False, can_compile=False),  # one layer at a time
    }
)
"""The modes but `auto`, the quickest first. `auto` is the first of those that stream which leaves room for a job."""

TOOLKIT_COMMIT = "27a03a91f23eb1b757d5ec2e80ee3e129cfcc350"
"""Of ostris/ai-toolkit (0.12.26): the one that everything here was compared with."""

DEFAULT_STEPS = 25
DEFAULT_GUIDANCE_SCALE = 4.0
DEFAULT_NUM_FRAMES = 41
DEFAULT_FPS = 16
DEFAULT_SIZE = 1024
DEFAULT_SEED = 42

MAX_TOKENS = 512
"""Tokens of a prompt that the Wan pipelines encode."""

BYTES_OF_A_JOB = 12_000_000_000
"""What a video of the default size needs beside the weights: up to 11.3 GB for the decode, by benchmarks/memory.py."""


@dataclass(frozen=True)
class Source:
    """Where one part of a pipeline is read from: a Hub repo id and a sub-folder ("" is the repo's root)."""

    repo: str
    subfolder: str

    def __str__(self) -> str:
        return f"{self.repo}/{self.subfolder}".rstrip("/")


@dataclass(frozen=True)
class ModelSpec:
    """Everything that differs between the models by a name or a number."""

    id: str
    title: str
    family: Family
    sources: Mapping[str, Source]
    """Pipeline component (as diffusers names it) to where it is read from."""
    size_divisor: int
    """Width and height are floored to a multiple of this, in pixels, as the model page says."""
    control_image: Literal["none", "optional", "required"]
    moe: bool
    """Two transformers, a LoRA for each: `high` on `transformer`, `low` on `transformer_2`."""
    trainer_shift: float
    """The shift of the trainer's FlowMatch Euler scheduler: the `flowmatch` sampler."""
    trainer_unipc_shift: float
    """The flow_shift of UniPC, with which the trainer sampled until 0.9.3."""
    trainer_size_divisor: int
    """What the trainer's samples are floored to."""
    trainer_leaves_out_embedders: bool
    """Whether a quantized training leaves the embedders and the last layer as they are."""
    lora_base_version: str
    """What ai-toolkit writes as `ss_base_model_version` into a LoRA of this model."""
    hidden_size: int
    num_blocks: int
    ffn_dim: int
    in_channels: int = 16
    """Channels of the latents and of what conditions them."""
    out_channels: int = 16
    image_dim: int | None = None
    """Width of the image encoder's embeddings, where the transformer takes them."""
    flow_shift: float | None = None
    """UniPC's flow_shift where it is set by hand; None: the scheduler as the checkpoint says."""
    boundary_ratio: float | None = None
    """Set by hand for the toolkit's pipeline; elsewhere it is what the checkpoint says."""
    expand_timesteps: bool = False
    drops_incomplete_frames: bool = False
    """How a frame count becomes 4n+1: see `Recipe.effective_frames`."""
    offload_modes: tuple[OffloadMode, ...] = tuple(OFFLOAD)
    """The modes that the model can run with beside `auto`, the quickest first."""

    @property
    def needs_toolkit(self) -> bool:
        return self.family in ("toolkit_i2v", "toolkit_ti2v")

    @property
    def transformers(self) -> tuple[str, ...]:
        """The components that take LoRAs."""
        return ("transformer", "transformer_2") if self.moe else ("transformer",)


def _all_from(repo: str, *parts: str) -> dict[str, Source]:
    return {part: Source(repo, part) for part in parts}


_STREAMED_MODES = tuple(mode for mode, offload in OFFLOAD.items() if offload.streamed is not None)
_TEXT_PARTS = ("text_encoder", "tokenizer")
_IMAGE_PARTS = ("image_encoder", "image_processor")

_WAN22_I2V_14B = ModelSpec(
    id="wan22_14b_i2v",
    title="Wan 2.2 I2V A14B",
    family="toolkit_i2v",
    sources={
        "vae": Source("ai-toolkit/wan2.1-vae", ""),
        **_all_from("ai-toolkit/umt5_xxl_encoder", *_TEXT_PARTS),
        **_all_from("ai-toolkit/Wan2.2-I2V-A14B-Diffusers-bf16", "transformer", "transformer_2"),
    },
    size_divisor=16,
    control_image="required",
    moe=True,
    trainer_shift=5.0,
    trainer_unipc_shift=3.0,
    trainer_size_divisor=16,
    trainer_leaves_out_embedders=True,
    lora_base_version="wan_2.2_14b",
    hidden_size=5120,
    num_blocks=40,
    ffn_dim=13824,
    in_channels=36,
    flow_shift=3.0,
    boundary_ratio=0.9,
    drops_incomplete_frames=True,
    offload_modes=_STREAMED_MODES,
)

_WAN22_T2V_14B = ModelSpec(
    id="wan22_14b_t2v",
    title="Wan 2.2 T2V A14B",
    family="t2v",
    sources={
        **_all_from("Wan-AI/Wan2.2-T2V-A14B-Diffusers", *_TEXT_PARTS, "scheduler", "vae"),
        **_all_from("ai-toolkit/Wan2.2-T2V-A14B-Diffusers-bf16", "transformer", "transformer_2"),
    },
    size_divisor=32,
    control_image="none",
    moe=True,
    trainer_shift=5.0,
    trainer_unipc_shift=3.0,
    trainer_size_divisor=16,
    trainer_leaves_out_embedders=True,
    lora_base_version="wan_2.2_14b",
    hidden_size=5120,
    num_blocks=40,
    ffn_dim=13824,
)

_WAN22_5B = ModelSpec(
    id="wan22_5b",
    title="Wan 2.2 TI2V 5B",
    family="toolkit_ti2v",
    sources=_all_from("Wan-AI/Wan2.2-TI2V-5B-Diffusers", *_TEXT_PARTS, "vae", "transformer"),
    size_divisor=32,
    control_image="optional",
    moe=False,
    trainer_shift=5.0,
    trainer_unipc_shift=5.0,
    trainer_size_divisor=32,
    trainer_leaves_out_embedders=True,
    lora_base_version="wan_2.2_5b",
    hidden_size=3072,
    num_blocks=30,
    ffn_dim=14336,
    in_channels=48,
    out_channels=48,
    flow_shift=5.0,
    expand_timesteps=True,
    drops_incomplete_frames=True,
    offload_modes=_STREAMED_MODES,
)

_WAN21_I2V_14B = ModelSpec(
    id="wan21_i2v_14b",
    title="Wan 2.1 I2V 14B 720P",
    family="i2v",
    sources=_all_from("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", *_TEXT_PARTS, *_IMAGE_PARTS, "scheduler", "vae", "transformer"),
    size_divisor=16,
    control_image="required",
    moe=False,
    trainer_shift=3.0,
    trainer_unipc_shift=3.0,
    trainer_size_divisor=16,
    trainer_leaves_out_embedders=False,
    lora_base_version="wan_2.1",
    hidden_size=5120,
    num_blocks=40,
    ffn_dim=13824,
    in_channels=36,
    image_dim=1280,
)

_WAN21_I2V_14B_480P = replace(
    _WAN21_I2V_14B,
    id="wan21_i2v_14b480p",
    title="Wan 2.1 I2V 14B 480P",
    sources=_all_from("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", *_WAN21_I2V_14B.sources),
)

_WAN21_14B = ModelSpec(
    id="wan21_14b",
    title="Wan 2.1 T2V 14B",
    family="t2v",
    sources=_all_from("Wan-AI/Wan2.1-T2V-14B-Diffusers", *_TEXT_PARTS, "scheduler", "vae", "transformer"),
    size_divisor=16,
    control_image="none",
    moe=False,
    trainer_shift=3.0,
    trainer_unipc_shift=3.0,
    trainer_size_divisor=16,
    trainer_leaves_out_embedders=False,
    lora_base_version="wan_2.1",
    hidden_size=5120,
    num_blocks=40,
    ffn_dim=13824,
)

_WAN21_1B = replace(
    _WAN21_14B,
    id="wan21_1b",
    title="Wan 2.1 T2V 1.3B",
    sources=_all_from("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", *_WAN21_14B.sources),
    hidden_size=1536,
    num_blocks=30,
    ffn_dim=8960,
)

MODELS: Mapping[str, ModelSpec] = MappingProxyType(
    {
        spec.id: spec
        for spec in (
            _WAN22_I2V_14B,
            _WAN22_T2V_14B,
            _WAN22_5B,
            _WAN21_I2V_14B,
            _WAN21_I2V_14B_480P,
            _WAN21_14B,
            _WAN21_1B,
        )
    }
)
"""Model id to its spec, in the order of the documentation."""
