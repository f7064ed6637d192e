"""The errors a job can end with. Each is one string that starts with its code; nothing of the machine is in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Code(StrEnum):
    """Every code. Where a request has several problems, the first of these is the code of its error."""

    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    MODEL_NOT_SERVED = "MODEL_NOT_SERVED"
    INVALID_INPUT = "INVALID_INPUT"
    LORA_FILE_REQUIRED = "LORA_FILE_REQUIRED"
    SINGLE_LORA_ONLY = "SINGLE_LORA_ONLY"
    MOE_FORMAT_REQUIRED = "MOE_FORMAT_REQUIRED"
    MOE_FORMAT_NOT_SUPPORTED = "MOE_FORMAT_NOT_SUPPORTED"
    SINGLE_MOE_CONFIG_ONLY = "SINGLE_MOE_CONFIG_ONLY"
    LORA_NOT_FOUND = "LORA_NOT_FOUND"
    LORA_DOWNLOAD_FAILED = "LORA_DOWNLOAD_FAILED"
    LORA_INVALID = "LORA_INVALID"
    LORA_INCOMPATIBLE = "LORA_INCOMPATIBLE"
    CONTROL_IMAGE_REQUIRED = "CONTROL_IMAGE_REQUIRED"
    CONTROL_IMAGE_INVALID = "CONTROL_IMAGE_INVALID"
    AI_TOOLKIT_REQUIRED = "AI_TOOLKIT_REQUIRED"
    CHECKPOINT_NOT_FOUND = "CHECKPOINT_NOT_FOUND"
    STORAGE_NOT_CONFIGURED = "STORAGE_NOT_CONFIGURED"
    UPLOAD_FAILED = "UPLOAD_FAILED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    TIMEOUT = "TIMEOUT"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


MEANING: dict[Code, str] = {
    Code.MODEL_NOT_FOUND: "no such model id",
    Code.MODEL_NOT_SERVED: "a known id, but this worker serves another",
    Code.INVALID_INPUT: "the request breaks the schema",
    Code.LORA_FILE_REQUIRED: "no LoRA in the request",
    Code.SINGLE_LORA_ONLY: "more than one on a model that takes one",
    Code.MOE_FORMAT_REQUIRED: "`transformer` missing on a high/low model",
    Code.MOE_FORMAT_NOT_SUPPORTED: "`transformer` on a model with one transformer",
    Code.SINGLE_MOE_CONFIG_ONLY: "a side twice, or more than two items",
    Code.LORA_NOT_FOUND: "no such file below LORA_DIR",
    Code.LORA_DOWNLOAD_FAILED: "the URL gave no file",
    Code.LORA_INVALID: "not safetensors, a web page, cut short",
    Code.LORA_INCOMPATIBLE: "keys or shapes of another model",
    Code.CONTROL_IMAGE_REQUIRED: "an image-to-video model without `ctrl_img`",
    Code.CONTROL_IMAGE_INVALID: "`ctrl_img` cannot be fetched or decoded",
    Code.AI_TOOLKIT_REQUIRED: "at start: no usable ai-toolkit checkout",
    Code.CHECKPOINT_NOT_FOUND: "at start: weights are missing",
    Code.STORAGE_NOT_CONFIGURED: "at start: a cloud worker without a bucket",
    Code.UPLOAD_FAILED: "the bucket did not take the result, which is kept; or at start: takes nothing",
    Code.OUT_OF_MEMORY: "the job is too large for the device",
    Code.TIMEOUT: "the job passed JOB_TIMEOUT, or is too slow to make it",
    Code.CANCELLED: "the job was stopped",
    Code.INTERNAL: "a fault of the worker; its log has the traceback",
}
"""What each code stands for, for the documentation."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a request: the code, the path of the field (`prompts[1].width`), the rule and the remedy."""

    code: Code
    field: str
    text: str

    def __str__(self) -> str:
        return f"`{self.field}`: {self.text}" if self.field else self.text


def is_refusal(status: int) -> bool:
    """Whether an HTTP status says no, rather than that it cannot be done now."""
    return 400 <= status < 500 and status not in (408, 425, 429)


class WorkerError(Exception):
    """A job ends with this; `str()` is what the client gets."""

    def __init__(self, code: Code, message: str, problems: Sequence[Problem] = ()) -> None:
        self.code = code
        self.problems = problems
        # The cloud drops a whole result that is not valid UTF-8, and a client can send lone surrogates.
        self.message = message.encode("utf-8", "replace").decode("utf-8")
        super().__init__(f"{code}: {self.message}")

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> WorkerError:
        """One error that lists every problem, under the code that comes first in Code."""
        if len(problems) == 1:
            return cls(problems[0].code, str(problems[0]), problems)
        first = min((problem.code for problem in problems), key=list(Code).index)
        lines = [
            f"({number}) {'' if problem.code is first else f'{problem.code}: '}{problem}"
            for number, problem in enumerate(problems, 1)
        ]
        return cls(first, f"{len(problems)} problems: " + "; ".join(lines), problems)
