"""A job's progress and its result, as dataclasses. The fields are those of docs/api.md."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from client.errors import JobFailed, JobStopped

_LONGEST_SLUG = 100
"""Bytes; file systems allow 255 in a name."""


@dataclass(frozen=True)
class Progress:
    """The status of a job. The fields after `status` are None until the worker reports them."""

    job_id: str
    status: str
    """IN_QUEUE, IN_PROGRESS, COMPLETED, FAILED, CANCELLED or TIMED_OUT."""
    stage: str | None = None
    prompt_index: int | None = None
    prompts: int | None = None
    """The number of prompts."""
    step: int | None = None
    steps: int | None = None
    percent: int | None = None
    seconds_left: float | None = None
    """Until the denoising ends."""

    @classmethod
    def of(cls, job_id: str, answer: dict[str, Any]) -> Progress:
        """The progress in an answer to /status; of an update that no worker of this project sends, the status alone."""
        update = answer.get("output") if answer["status"] == "IN_PROGRESS" else None
        names = ("stage", "prompt_index", "prompts", "step", "steps", "percent", "seconds_left")
        if isinstance(update, dict) and "stage" in update:
            with suppress(ValidationError):
                known = {name: update.get(name) for name in names}
                return _PROGRESS.validate_python({"job_id": job_id, "status": answer["status"], **known})
        return cls(job_id, answer["status"])


@dataclass(frozen=True)
class Health:
    """The workers of an endpoint, or the one of a local API, and the jobs that they have."""

    running: int
    """Workers that have a job."""
    idle: int
    """Workers that wait for one."""
    starting: int
    unusable: int
    """Workers that RunPod holds back, or found unhealthy."""
    jobs_waiting: int
    model: str | None
    """The model id that is served. None for an endpoint: RunPod does not tell."""

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Health:
        """The answer to /health; what is missing in it counts as 0."""

        def count(group: str, *names: str) -> int:
            values = answer.get(group)
            values = [values.get(name) for name in names] if isinstance(values, dict) else []
            return sum(value for value in values if type(value) is int)

        model = answer.get("model")
        return cls(
            running=count("workers", "running"),
            idle=count("workers", "idle"),
            starting=count("workers", "initializing"),
            unusable=count("workers", "throttled", "unhealthy"),
            jobs_waiting=count("jobs", "inQueue"),
            model=model if isinstance(model, str) else None,
        )


@dataclass(frozen=True)
class File:
    """A file that can be downloaded. Its `url` is a secret until it expires."""

    prompt_index: int
    url: str
    expires_at: str | None
    """UTC in ISO 8601; None for a local file."""
    key: str
    """The file's name in the bucket, or below OUTPUT_DIR."""
    width: int
    height: int
    bytes: int

    @property
    def title(self) -> str:
        """The file's name in messages."""
        return f"prompts[{self.prompt_index}]"


@dataclass(frozen=True)
class Picture(File):
    """A JPEG for a video: its first frame, or a sheet of up to 16 frames."""

    kind: Literal["poster", "contact_sheet"]

    @property
    def title(self) -> str:
        return f"{super().title}, {self.kind.replace('_', ' ')}"

    def name_for(self, video: Path) -> str:
        """The picture's file name beside its video, with the same ending as in the bucket."""
        return f"{video.stem}{'.poster.jpg' if self.kind == 'poster' else '.sheet.jpg'}"


@dataclass(frozen=True)
class Output(File):
    """One finished video or image. Width, height, frames and seed are the effective ones."""

    kind: Literal["image", "video"]
    prompt: str
    """With the trigger word filled in."""
    format: Literal["mp4", "webp", "gif", "png"]
    num_frames: int
    fps: int
    seed: int
    poster: Picture | None = None
    contact_sheet: Picture | None = None

    def pictures(self, posters: bool) -> list[Picture]:
        """The contact sheet, if there is one, and with `posters` the poster."""
        return [picture for picture in (self.contact_sheet, self.poster if posters else None) if picture]

    @property
    def suffix(self) -> str:
        """The file's suffix. Lossless frames are a zip."""
        return ".zip" if self.kind == "video" and self.format == "png" else f".{self.format}"

    def name(self) -> str:
        """A file name from the prompt and the seed, such as `sks-a-sailing-boat-at-sunset-42.mp4`."""
        slug = re.sub(r"[\W_]+", "-", self.prompt.lower()).encode()[:_LONGEST_SLUG].decode(errors="ignore").strip("-")
        return f"{slug or self.kind}-{self.seed}{self.suffix}"


@dataclass(frozen=True)
class FailedPrompt:
    """A prompt that failed in a job of which other prompts succeeded."""

    prompt_index: int
    code: str
    message: str


@dataclass(frozen=True)
class Result:
    """A completed job."""

    job_id: str
    model: str
    outputs: tuple[Output, ...]
    """In the order of the prompts."""
    failed: tuple[FailedPrompt, ...]
    warnings: tuple[str, ...]
    settings: dict[str, Any]
    timings: dict[str, float]
    raw: dict[str, Any]
    """The worker's answer, unchanged."""

    @property
    def full_run_seconds(self) -> float | None:
        """How long the full run of a draft would take the GPU; None if the answer does not say."""
        seconds = self.timings.get("full_run_estimate")
        return seconds if isinstance(seconds, int | float) else None

    @classmethod
    def of(cls, job_id: str, raw: Any) -> Result:
        """The result in the `output` of an answer to /status. Raises ValueError if it is not a result of this worker."""
        try:
            prompts = {item["prompt_index"]: item["prompt"] for item in raw.get("settings", {}).get("prompts", [])}
            outputs = [
                _OUTPUT.validate_python(
                    {"kind": kind, "prompt": prompts.get(item["prompt_index"], raw["model"]), **item, **_pictures(item)}
                )
                for kind in ("image", "video")
                for item in raw["outputs"][f"{kind}s"]
            ]
            return cls(
                job_id=job_id,
                model=raw["model"],
                outputs=tuple(sorted(outputs, key=lambda output: output.prompt_index)),
                failed=tuple(_FAILED.validate_python(item) for item in raw.get("errors", [])),
                warnings=tuple(raw.get("warnings", [])),
                settings=raw.get("settings", {}),
                timings=raw.get("timings", {}),
                raw=raw,
            )
        except (AttributeError, KeyError, TypeError, ValidationError) as error:
            raise ValueError(f"not a result of worker-wan-lora ({type(error).__name__})") from error


def _pictures(item: dict[str, Any]) -> dict[str, Any]:
    kinds = [kind for kind in ("poster", "contact_sheet") if item.get(kind)]
    return {kind: {**item[kind], "kind": kind, "prompt_index": item["prompt_index"]} for kind in kinds}


_PROGRESS = TypeAdapter(Progress)
_OUTPUT = TypeAdapter(Output)
_FAILED = TypeAdapter(FailedPrompt)


RUNNING = ("IN_QUEUE", "IN_PROGRESS")
"""A job's statuses before the last one."""


def has_ended(answer: dict[str, Any]) -> bool:
    """Whether an answer to /status is a job's last one."""
    return answer["status"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


def result_of(job_id: str, answer: dict[str, Any]) -> Result:
    """The result in the last answer to /status. Raises JobFailed and JobStopped."""
    status = answer["status"]
    if status == "CANCELLED":
        raise JobStopped("CANCELLED", "the job was cancelled")
    if status == "TIMED_OUT":
        raise JobStopped("TIMEOUT", "RunPod stopped the job at its time limit; raise the endpoint's execution timeout")
    if status == "FAILED":
        text = _error_text(answer.get("error"))
        if re.match("(CANCELLED|TIMEOUT): ", text):
            raise JobStopped(text.partition(":")[0], text)
        raise JobFailed(text)
    if answer.get("output") is None:
        raise JobFailed(f"the job completed, but its result was lost; its files may be in the bucket, below {job_id}/")
    try:
        return Result.of(job_id, answer["output"])
    except ValueError as error:
        raise JobFailed(f"the job completed, but its answer is {error}; does another worker run at this address?") from error


def _error_text(error: Any) -> str:
    """The text of a failed job's error. RunPod sends an uncaught exception of a worker as JSON with a traceback."""
    try:
        uncaught = json.loads(error) if isinstance(error, str) else error
        return str(uncaught["error_message"])
    except (ValueError, TypeError, KeyError):
        return str(error or "RunPod gives no reason; look at the worker's log")
