"""The seven models as data. Adding a model starts here. No torch in this file.

Sources: the model pages of the ids, for the trainer's own sampling ai-toolkit 0.12.26, and for drafts LightX2V's configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

OffloadMode = Literal["auto", "none", "text_encoder", "swap", "group", "model", "sequential"]
"""See OFFLOAD."""
Family = Literal["t2v", "i2v", "toolkit_i2v", "toolkit_ti2v"]
"""Which pipeline a model runs on: diffusers' own (`diffusers_models`), or ai-toolkit's (`toolkit_models`)."""
Attention = Literal["auto", "native", "cudnn", "flash", "flash3"]
Sampler = Literal["unipc", "flowmatch"]
Match = Literal["documented", "preview"]
"""What a video is made to match: the model page, or the samples of the trainer."""
ImageFit = Literal["stretch", "crop", "pad"]
"""How an image is brought to the video's size: `crop` cuts off what is too wide or too high, `pad` adds black."""
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
    swaps_transformers: bool = False
    """Whether only the transformer that computes is on the device: each of the two comes once per video."""


OFFLOAD: Mapping[OffloadMode, Offload] = MappingProxyType(
    {
        "none": Offload(streamed=()),
        "text_encoder": Offload(streamed=("text_encoder",)),  # layer by layer, for a text that is new
        "swap": Offload(streamed=("text_encoder",), swaps_transformers=True),  # for models with two transformers
        "group": Offload(streamed=("text_encoder", "transformer", "transformer_2"), can_compile=False),  # block by block
        "model": Offload(streamed=None),  # one component at a time is on the device
        "sequential": Offload(streamed=None, can_merge=False, can_compile=False),  # one layer at a time
    }
)
"""The modes but `auto`, the quickest first. `auto` is the first of those that stream which leaves room for a job."""

TOOLKIT_COMMIT = "27a03a91f23eb1b757d5ec2e80ee3e129cfcc350"
"""The commit of ostris/ai-toolkit (0.12.26) that everything here was compared with."""

DEFAULT_STEPS = 25
DEFAULT_GUIDANCE_SCALE = 4.0
DEFAULT_NUM_FRAMES = 41
DEFAULT_FPS = 16
DEFAULT_SIZE = 1024
DEFAULT_SEED = 42

MAX_TOKENS = 512
"""Tokens of a prompt that the Wan pipelines encode."""

ACTIVATIONS = 12_000_000_000
"""What a video of up to 1280x720, 81 frames computes with: 11.6 GB in the denoise of 2.1 I2V with a LoRA, 11.3 in the decode of
1024x1024, 41 frames. By arithmetic: benchmarks/memory.py."""
RESERVE = 3_000_000_000
"""What kernels take as workspace and what the allocator loses between pieces: an estimate, to be measured on a GPU."""
LORA_RANK = 128
"""`auto` leaves room for LoRAs of this rank on every linear layer of the blocks, in 16 bits."""
BYTES_OF_THE_PROCESS = 6_000_000_000
"""Main memory of a worker beside weights that wait there: libraries, CUDA, frames, one LoRA's file. An estimate."""


@dataclass(frozen=True)
class Source:
    """Where one part of a pipeline is read from: a Hub repo id and a sub-folder ("" is the repo's root)."""

    repo: str
    subfolder: str

    def __str__(self) -> str:
        return f"{self.repo}/{self.subfolder}".rstrip("/")


@dataclass(frozen=True)
class DistilledLora:
    """A LoRA with which a model needs few steps: a file on the Hub."""

    repo: str
    commit: str
    path: str
    sha256: str
    """The checksum of the file, as its page on the Hub says; that of Wan 2.1 I2V as programs say that pin it."""
    side: Literal["high", "low"] | None = None
    strength: float = 1.0
    without: tuple[str, ...] = ()
    """Parts of the names of layers that are left out: the file has them, and the model does not. The authors' loader leaves
    them out too."""

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}"

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repo}/resolve/{self.commit}/{self.path}"


@dataclass(frozen=True)
class Draft:
    """How the authors of distilled LoRAs sample with them: plain Euler steps, without guidance."""

    loras: tuple[DistilledLora, ...]
    source: str
    """Where the authors say so."""
    timesteps: tuple[int, ...]
    """One for each step, of 1000 and before the shift."""
    shift: float
    low_noise_from: int | None = None
    """The first step, counted from 0, of `transformer_2`; None for a model with one transformer."""

    @property
    def shifted_timesteps(self) -> tuple[float, ...]:
        """What the transformer is given at each step."""
        return tuple(1000 * self.shift * t / (1000 + (self.shift - 1) * t) for t in self.timesteps)

    @property
    def boundary_ratio(self) -> float | None:
        """A noise level between those of the last step of `transformer` and the first of `transformer_2`."""
        if self.low_noise_from is None:
            return None
        before, after = self.shifted_timesteps[self.low_noise_from - 1 : self.low_noise_from + 1]
        return (before + after) / 2000


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
    takes_last_image: bool = False
    """Whether the transformer takes a last frame among what conditions it, as the first one. Wan 2.2 I2V A14B does; Wan 2.1's
    I2V was trained with a first frame alone, and its authors have another model (FLF2V) for both."""
    draft: Draft | None = None
    """The few-step recipe; None where there is none."""

    @property
    def needs_toolkit(self) -> bool:
        return self.family in ("toolkit_i2v", "toolkit_ti2v")

    @property
    def offload_modes(self) -> tuple[OffloadMode, ...]:
        """The modes that the model can run with beside `auto`, the quickest first.

        What accelerate does needs diffusers' own pipelines.
        """
        return tuple(
            mode
            for mode, offload in OFFLOAD.items()
            if (self.moe or not offload.swaps_transformers) and (offload.streamed is not None or not self.needs_toolkit)
        )

    def waits_in_memory(self, mode: OffloadMode) -> tuple[str, ...]:
        """The components that are in main memory and come to the device when they are used."""
        offload = OFFLOAD[mode]
        if offload.streamed is None:
            return tuple(self.sources)
        return (*offload.streamed, *(self.transformers if offload.swaps_transformers else ()))

    def bytes_of_a_job(self, mode: OffloadMode) -> int:
        """What a job may take of the device beside the weights that `mode` keeps there."""
        squares = 10 if self.image_dim else 8
        features = squares * 2 * self.hidden_size + 2 * (
            self.hidden_size + self.ffn_dim
        )  # in and out, of all layers of a block
        if OFFLOAD[mode].swaps_transformers:
            blocks = self.num_blocks
        elif "transformer" in self.waits_in_memory(mode):
            blocks = 2
        else:
            blocks = self.num_blocks * len(self.transformers)
        return ACTIVATIONS + RESERVE + features * LORA_RANK * 2 * blocks

    @property
    def transformers(self) -> tuple[str, ...]:
        """The components that take LoRAs."""
        return ("transformer", "transformer_2") if self.moe else ("transformer",)


def _all_from(repo: str, *parts: str) -> dict[str, Source]:
    return {part: Source(repo, part) for part in parts}


_LIGHTX2V = "ModelTC/LightX2V, commit f8aee98b5462cca8d7288888146ebd95592bf266, configs/distill/"
"""The authors' own settings. Their scheduler is lightx2v/models/schedulers/wan/step_distill/scheduler.py at that commit."""
_WAN21_DISTILL = ("lightx2v/Wan2.1-Distill-Loras", "27ae38da91014b947dd39cc3fa78b97cd7b386dd")
_WAN22_DISTILL = ("lightx2v/Wan2.2-Distill-Loras", "570044187a5219776ef30a5c60c6f76428a3a10a")
"""Hub repos with the commits at which they have the files of the recipes."""


def _four_steps(config: str, *loras: DistilledLora) -> Draft:
    """The recipe that all of LightX2V's configs share, and the files of one."""
    low_noise_from = 2 if len(loras) == 2 else None
    return Draft(loras, _LIGHTX2V + config, timesteps=(1000, 750, 500, 250), shift=5.0, low_noise_from=low_noise_from)


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
    takes_last_image=True,
    draft=_four_steps(
        "wan22/wan_moe_i2v_distill_with_lora.json",
        DistilledLora(
            *_WAN22_DISTILL,
            "wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors",
            "887c3bdeb74e83859c920438e16ca31f39ab18ce189abc5f0e36f8348c5bbb19",
            "high",
        ),
        DistilledLora(
            *_WAN22_DISTILL,
            "wan2.2_i2v_A14b_low_noise_lora_rank64_lightx2v_4step_1022.safetensors",
            "8833bd4fd7c8eabebf0bc8ee5cfaf47f4f310ce116928a02c1adf8941dd4b0f1",
            "low",
            without=("image_embedder", "add_k_proj", "add_v_proj", "norm_added_k"),  # it is the file of Wan 2.1 I2V
        ),
    ),
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
    draft=_four_steps(
        "wan22/wan_moe_t2v_distill_lora.json",
        DistilledLora(
            *_WAN22_DISTILL,
            "wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217.safetensors",
            "89003385f8a9d53ba58fd6ede647fdc90292e8568a54683fcfe6db5556a31769",
            "high",
        ),
        DistilledLora(
            *_WAN22_DISTILL,
            "wan2.2_t2v_A14b_low_noise_lora_rank64_lightx2v_4step_1217.safetensors",
            "4df7c206f3189472da2f92c0a42dcf308f04433d9c14302d08d56e99a3f51322",
            "low",
        ),
    ),
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
    draft=_four_steps(
        "wan21/wan_i2v_distill_lora_4step_cfg.json",
        DistilledLora(
            *_WAN21_DISTILL,
            "wan2.1_i2v_lora_rank64_lightx2v_4step.safetensors",
            "8833bd4fd7c8eabebf0bc8ee5cfaf47f4f310ce116928a02c1adf8941dd4b0f1",
        ),
    ),
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
    draft=_four_steps(
        "wan21/wan_t2v_distill_lora_4step_cfg.json",
        DistilledLora(
            *_WAN21_DISTILL,
            "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors",
            "1c918df9eaa102766d8f99104209ce55fe7a892278a667a63d721c5d1c18efb1",
        ),
    ),
)

_WAN21_1B = replace(
    _WAN21_14B,
    id="wan21_1b",
    title="Wan 2.1 T2V 1.3B",
    sources=_all_from("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", *_WAN21_14B.sources),
    hidden_size=1536,
    num_blocks=30,
    ffn_dim=8960,
    draft=None,
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
