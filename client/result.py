"""What comes back, as dataclasses: how far a job is, and what it made. The fields are those of docs/api.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

_LONGEST_SLUG = 100
"""Bytes; file systems take 255 in a name."""


@dataclass(frozen=True)
class Progress:
    """A job on its way. Below `status` everything is None until the worker says it."""

    job_id: str
    status: str
    """IN_QUEUE, IN_PROGRESS, COMPLETED, FAILED, CANCELLED or TIMED_OUT."""
    stage: str | None = None
    prompt_index: int | None = None
    prompts: int | None = None
    step: int | None = None
    steps: int | None = None
    percent: int | None = None
    seconds_left: float | None = None
    """Of the denoising."""

    @classmethod
    def of(cls, job_id: str, answer: dict[str, Any]) -> Progress:
        update = answer.get("output") if answer["status"] == "IN_PROGRESS" else None
        if not isinstance(update, dict) or "stage" not in update:
            return cls(job_id, answer["status"])
        names = ("stage", "prompt_index", "prompts", "step", "steps", "percent", "seconds_left")
        return cls(job_id, answer["status"], **{name: update.get(name) for name in names})


@dataclass(frozen=True)
class File:
    """What can be fetched. `url` is a secret until it expires."""

    prompt_index: int
    url: str
    expires_at: str | None
    """UTC in ISO 8601; None for a local file."""
    key: str
    width: int
    height: int
    bytes: int

    @property
    def what(self) -> str:
        """In a message."""
        return f"prompts[{self.prompt_index}]"


@dataclass(frozen=True)
class Picture(File):
    """A JPEG of a video: its first frame, or up to 16 frames."""

    kind: Literal["poster", "contact_sheet"]

    @property
    def what(self) -> str:
        return f"{super().what}, {self.kind.replace('_', ' ')}"

    @property
    def suffix(self) -> str:
        """What comes after the video's name, as in the bucket."""
        return ".poster.jpg" if self.kind == "poster" else ".sheet.jpg"


@dataclass(frozen=True)
class Output(File):
    """One finished video or image. Width, height, frames and seed are the effective ones."""

    kind: Literal["image", "video"]
    prompt: str
    """With the trigger word in its place."""
    format: Literal["mp4", "webp", "gif", "png"]
    num_frames: int
    fps: int
    seed: int
    poster: Picture | None = None
    contact_sheet: Picture | None = None

    def pictures(self, posters: bool) -> list[Picture]:
        """Those to fetch: the contact sheet, which was asked for, and the poster for who wants it."""
        return [picture for picture in (self.contact_sheet, self.poster if posters else None) if picture]

    @property
    def suffix(self) -> str:
        """Of the file: lossless frames come as a zip."""
        return ".zip" if self.kind == "video" and self.format == "png" else f".{self.format}"

    def name(self) -> str:
        """A file name that says what is in it, as `sks-a-sailing-boat-at-sunset-42.mp4`."""
        slug = re.sub(r"[\W_]+", "-", self.prompt.lower()).encode()[:_LONGEST_SLUG].decode(errors="ignore").strip("-")
        return f"{slug or self.kind}-{self.seed}{self.suffix}"


@dataclass(frozen=True)
class FailedPrompt:
    """A prompt that made nothing, in a job that made something."""

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
    """The worker's answer as it came."""

    @classmethod
    def of(cls, job_id: str, raw: Any) -> Result:
        """Raises ValueError for what is no result of this worker."""
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
            raise ValueError(f"no result of worker-wan-lora ({type(error).__name__})") from error


def _pictures(item: dict[str, Any]) -> dict[str, Any]:
    kinds = [kind for kind in ("poster", "contact_sheet") if item.get(kind)]
    return {kind: {**item[kind], "kind": kind, "prompt_index": item["prompt_index"]} for kind in kinds}


_OUTPUT = TypeAdapter(Output)
_FAILED = TypeAdapter(FailedPrompt)
