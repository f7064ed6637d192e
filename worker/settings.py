"""The environment, read once at start into a frozen Settings. Nothing else in the worker reads the environment."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from pipelines.catalog import MODELS, OFFLOAD, TOOLKIT_COMMIT, Attention, Match, Offload, OffloadMode, Quantize
from pipelines.checkpoints import Place
from worker.errors import Code, WorkerError

SEVEN_DAYS = 7 * 24 * 3600
"""The longest time a SigV4 presigned URL can be valid, in seconds."""


BUCKET_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]$"
"""The bucket names that boto3 accepts. It would refuse others only at the first upload."""


_SECONDS_PER_CLOUD_JOB = 570.0
"""RunPod ends a job after 600 s unless the endpoint says otherwise, and then everything the job made is lost."""


def is_in_cloud() -> bool:
    """Return whether RunPod runs this process. An empty variable is not set, and is deleted: the SDK would take it as set."""
    if not os.environ.get("RUNPOD_WEBHOOK_GET_JOB"):
        os.environ.pop("RUNPOD_WEBHOOK_GET_JOB", None)
        return False
    return True


class SettingsError(Exception):
    """One line that names every environment variable that is missing or wrong."""


class Settings(BaseSettings):
    """Every environment variable the worker knows. A variable that is set but empty counts as not set."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True, validate_default=False)

    model_id: str = Field(description="The one model this worker serves.")
    checkpoint_dir: Path = Field(
        default=Path("/checkpoints"),
        description="The first place to look for weights: one folder per Hub repo id, `ORG/NAME`, in diffusers layout.",
    )
    model_cache_dir: Path = Field(
        default=Path("/runpod-volume/huggingface-cache/hub"),
        description="The second place: the platform's cache of models, in the layout of `huggingface_hub`.",
    )
    volume_checkpoint_dir: Path = Field(
        default=Path("/runpod-volume/checkpoints"),
        description="The last place: a folder on a network volume, in the layout of `CHECKPOINT_DIR`.",
    )
    accelerator_dir: Path | None = Field(
        default=None,
        description="The first place to look for the distilled LoRAs of drafts, as `ORG/NAME/FILE` or `FILE`; then they are "
        "looked for in the places of the weights.",
    )
    allow_download: bool = Field(
        default=False,
        description="`1`: at start, download missing weights from the Hugging Face Hub to `VOLUME_CHECKPOINT_DIR` or, without "
        "a volume, to `CHECKPOINT_DIR`. A draft downloads its missing distilled LoRAs to `LORA_CACHE_DIR`.",
    )
    ai_toolkit_path: Path | None = Field(
        default=None, description="Checkout of ostris/ai-toolkit; needed by `wan22_14b_i2v` and `wan22_5b`."
    )
    ai_toolkit_commit: str = Field(
        default=TOOLKIT_COMMIT,
        pattern=r"^[0-9a-f]{40}$",
        description="The commit that the checkout must have; another one may sample differently.",
    )
    lora_dir: Path = Field(default=Path("/runpod-volume/loras"), description="The folder for relative `loras[].path`.")
    lora_cache_dir: Path = Field(
        default=Path(tempfile.gettempdir()) / "lora-cache",
        description="The cache of LoRAs from URLs. On a network volume, all workers share it.",
    )
    lora_cache_max_bytes: int = Field(
        default=20 * 1024**3,
        gt=0,
        description="Largest size of LORA_CACHE_DIR in bytes; beyond it, the least recently used LoRAs are deleted.",
    )
    allow_private_downloads: bool = Field(
        default=False,
        description="`1`: URLs in requests may lead to private networks and to this machine. For a local machine only.",
    )
    device: Literal["cuda", "cpu"] = Field(default="cuda", description="`cuda` or `cpu`.")
    gpus: Literal["auto", "1", "2", "4"] = Field(
        default="auto",
        description="How many GPUs make one video. `2`: each computes one of the two passes of a step with guidance, in about "
        "half the time; without guidance, each makes a video of its own. It does not change the frames. `4`: pairs of them "
        "split each pass too, in about a quarter of the time, which changes the last bit of a frame; without guidance, all "
        "four split the one pass. `auto`: as many of 4, 2 or 1 as the machine has.",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="Data type of the weights and the computation: `bfloat16`, `float32`; `auto`: bfloat16 on `cuda`, float32 "
        "on `cpu`. The trainer makes its samples in bfloat16.",
    )
    offload_mode: OffloadMode = Field(
        default="auto",
        description="What stays in main memory: nothing (`none`), the `text_encoder`, also the idle one of the two "
        "transformers of Wan 2.2 14B (`swap`), also all transformers, streamed block by block (`group`), all but one component "
        "(`model`), all but one layer (`sequential`). `auto`: the first of `none`, `text_encoder`, `swap` and `group` that "
        "leaves room for a job.",
    )
    quantize: Quantize = Field(
        default="none",
        description="Format of the weights of transformers and text encoder, as in a quantized training: `qfloat8` (half the "
        "memory of bf16), `uint4` (a third), `float8`, `int8`, `uint2` to `uint7`; `auto`: the first of `none`, `qfloat8` and "
        "`uint4` that needs no streaming of a transformer. It changes the frames.",
    )
    attention: Attention = Field(
        default="native",
        description="Attention kernels: `native` (torch's own, as in plain diffusers), `cudnn`, `flash` or `flash3` (where "
        "installed), `auto` (the fastest that works here). All but `native` change the last bit of a frame.",
    )
    compile: bool = Field(
        default=False,
        description="`1`: compile the transformers' blocks when they first run. It changes the last bit of a frame.",
    )
    compile_cache_dir: Path | None = Field(
        default=None,
        description="The cache of compiled code. On a network volume or in the image, only the first worker compiles. Not set: "
        "torch's own folder in the system's temp folder.",
    )
    exact: bool = Field(
        default=False,
        description="`1`: make the frames of plain diffusers, to the bit; ATTENTION and COMPILE are ignored, and at most two "
        "GPUs make a video.",
    )
    default_match: Match = Field(
        default="documented", description="`match` for requests that do not set it: `documented` or `preview`."
    )
    lora_mode: Literal["adapter", "merge"] = Field(
        default="adapter",
        description="How LoRAs are applied with `documented`: `adapter` (beside the weights) or `merge` (added to them).",
    )
    output_dir: Path = Field(default=Path("output"), description="The folder for results when no bucket is configured.")
    bucket_name: str | None = Field(
        default=None,
        pattern=BUCKET_NAME,
        description="The bucket; setting it turns uploads on.",
    )
    bucket_endpoint_url: str | None = Field(
        default=None,
        description="Endpoint of an S3-compatible store; not set: AWS S3 in `BUCKET_REGION`.",
    )
    bucket_access_key_id: SecretStr | None = Field(default=None, description="Access key id of the bucket.")
    bucket_secret_access_key: SecretStr | None = Field(default=None, description="Secret key of the bucket.")
    bucket_session_token: SecretStr | None = Field(
        default=None, description="Session token of temporary keys; results cannot be downloaded after it expires."
    )
    bucket_region: str | None = Field(
        default=None,
        description="Region for signatures; not set: taken from the endpoint's name, else `us-east-1`.",
    )
    bucket_addressing_style: Literal["auto", "path", "virtual"] = Field(
        default="auto", description="`auto`: virtual-hosted on AWS, path elsewhere."
    )
    bucket_key_prefix: str = Field(default="", description="Prefix of every object key, such as `videos/`.")
    presigned_url_ttl: int = Field(
        default=86400, ge=1, le=SEVEN_DAYS, description="How long result URLs are valid, in seconds; 7 days at most."
    )
    upload_timeout: float = Field(
        default=300, gt=0, description="Seconds for which an upload is retried before its file goes to `RECOVERY_DIR`."
    )
    recovery_dir: Path = Field(
        default=Path(tempfile.gettempdir()) / "worker-wan-lora-recovery",
        description="The folder for results that could not be uploaded; the next worker uploads them. Best on a volume.",
    )
    recovery_max_bytes: int = Field(
        default=20 * 1024**3,
        gt=0,
        description="Largest size of RECOVERY_DIR in bytes; beyond it, files for jobs' own buckets are deleted, and then no "
        "more files are kept.",
    )
    hf_token: SecretStr | None = Field(
        default=None,
        description="Token for LoRAs on the Hugging Face Hub if a request has no `hf_token`, and for `ALLOW_DOWNLOAD`.",
    )
    job_timeout: float | None = Field(
        default=None,
        ge=0,
        description="Seconds after which a job stops with `TIMEOUT`, 0 for no limit; not set: 570 in the cloud, just under "
        "RunPod's own limit of 600, and none elsewhere.",
    )
    max_lora_bytes: int = Field(default=8 * 1024**3, gt=0, description="Largest LoRA file to download, in bytes.")
    max_image_bytes: int = Field(default=64 * 1024**2, gt=0, description="Largest control image to download, in bytes.")
    runpod_webhook_get_job: str | None = Field(
        default=None, description="Set by RunPod: the worker runs in the cloud, where a bucket is required."
    )

    runpod_ai_api_key: SecretStr | None = Field(default=None, description="Set by RunPod; kept out of the log.")

    @property
    def secrets(self) -> list[str]:
        """Secrets to redact from logs."""
        values = (getattr(self, name) for name in type(self).model_fields)
        return [value.get_secret_value() for value in values if isinstance(value, SecretStr)]

    @property
    def compiles(self) -> bool:
        return self.compile and not self.exact

    @property
    def checkpoint_places(self) -> list[Place]:
        """The places to look for weights, in this order."""
        return [
            Place("CHECKPOINT_DIR", self.checkpoint_dir),
            Place("MODEL_CACHE_DIR", self.model_cache_dir, is_hub_cache=True),
            Place("VOLUME_CHECKPOINT_DIR", self.volume_checkpoint_dir),
        ]

    @property
    def accelerator_places(self) -> list[Place]:
        """The places to look for distilled LoRAs, in this order."""
        own = [Place("ACCELERATOR_DIR", self.accelerator_dir)] if self.accelerator_dir else []
        return [*own, *self.checkpoint_places]

    @property
    def in_cloud(self) -> bool:
        return self.runpod_webhook_get_job is not None

    @property
    def seconds_per_job(self) -> float | None:
        """How long a job may take; None: no limit."""
        default = _SECONDS_PER_CLOUD_JOB if self.in_cloud else None
        return (self.job_timeout if self.job_timeout is not None else default) or None

    @field_validator("bucket_access_key_id", "bucket_secret_access_key", "bucket_session_token", "hf_token", mode="before")
    @classmethod
    def _without_white_space(cls, value: object) -> object:
        """Strip white space. Keys are sometimes pasted with a line end, and no key contains white space."""
        return value.strip() if isinstance(value, str) else value

    @field_validator("model_id")
    @classmethod
    def _known_model(cls, value: str) -> str:
        if value not in MODELS:
            raise ValueError(f"{value!r} is not a model id; set it to one of {', '.join(MODELS)}")
        return value

    @model_validator(mode="after")
    def _possible_offload_mode(self) -> Settings:
        modes = MODELS[self.model_id].offload_modes
        if self.offload_mode not in ("auto", *modes):
            use = f"use one of auto, {', '.join(modes)}"
            raise ValueError(f"OFFLOAD_MODE={self.offload_mode} does not work with {self.model_id}; {use}")
        offload = OFFLOAD.get(self.offload_mode, Offload(streamed=()))
        if not offload.can_merge and (self.lora_mode == "merge" or self.default_match == "preview"):
            raise ValueError(
                f"OFFLOAD_MODE={self.offload_mode} cannot merge LoRAs; use auto or model, or set LORA_MODE=adapter and "
                "DEFAULT_MATCH=documented"
            )
        if self.compiles and not offload.can_compile:
            raise ValueError(f"COMPILE=1 does not work with OFFLOAD_MODE={self.offload_mode}; set COMPILE=0, or another mode")
        if self.offload_mode not in ("auto", "none") and self.device != "cuda":
            raise ValueError(f"OFFLOAD_MODE={self.offload_mode} needs DEVICE=cuda; use OFFLOAD_MODE=auto")
        return self

    @model_validator(mode="after")
    def _complete_bucket(self) -> Settings:
        needed = {
            "BUCKET_ACCESS_KEY_ID": self.bucket_access_key_id,
            "BUCKET_SECRET_ACCESS_KEY": self.bucket_secret_access_key,
        }
        given = [self.bucket_name, self.bucket_endpoint_url, *needed.values()]
        if any(given):
            missing = [name for name, value in {"BUCKET_NAME": self.bucket_name, **needed}.items() if not value]
            if missing:
                raise ValueError(f"the bucket is only partly configured; set {' and '.join(missing)} too")
        return self


def load_settings() -> Settings:
    """Read and check the environment.

    Raises SettingsError (a variable is missing or wrong), WorkerError with STORAGE_NOT_CONFIGURED (in the cloud without a
    bucket: results would be lost after the GPU time was spent).
    """
    try:
        settings = Settings()  # type: ignore[call-arg]
    except ValidationError as error:
        raise SettingsError("; ".join(_problem(problem) for problem in error.errors())) from None
    if settings.in_cloud and not settings.bucket_name:
        raise WorkerError(
            Code.STORAGE_NOT_CONFIGURED,
            "a worker in the cloud needs a bucket, or its results would be lost: set BUCKET_NAME, BUCKET_ACCESS_KEY_ID and "
            "BUCKET_SECRET_ACCESS_KEY, and BUCKET_ENDPOINT_URL unless it is AWS S3",
        )
    return settings


def _problem(problem: object) -> str:
    """Return `NAME: what is wrong`. The value is not repeated: it may be a secret."""
    assert isinstance(problem, dict)
    name = ".".join(str(part) for part in problem["loc"]).upper()
    if problem["type"] == "missing":
        return f"{name} is not set; set it to one of {', '.join(MODELS)}"
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "string_pattern_mismatch":
        text = "is not a commit; a commit has 40 hexadecimal digits"
    if problem["type"] == "string_pattern_mismatch" and name == "BUCKET_NAME":
        text = "is not a bucket name; a name has 3 to 63 letters, digits, dots, dashes and underscores"
    return f"{name}: {text}" if name else text
