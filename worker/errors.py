"""The errors that a job can end with. Each is one string that starts with its code and reveals nothing about the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Code(StrEnum):
    """Every code. A request with several problems fails with the first of their codes in this order."""

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
    Code.MODEL_NOT_FOUND: "not a model id",
    Code.MODEL_NOT_SERVED: "a model id that another worker serves",
    Code.INVALID_INPUT: "the request does not fit the schema",
    Code.LORA_FILE_REQUIRED: "the request has no LoRA",
    Code.SINGLE_LORA_ONLY: "more than one LoRA for a model that takes one",
    Code.MOE_FORMAT_REQUIRED: "`transformer` is missing, and the model has a high and a low side",
    Code.MOE_FORMAT_NOT_SUPPORTED: "`transformer` is given, and the model has one transformer",
    Code.SINGLE_MOE_CONFIG_ONLY: "one side is given twice, or there are more than two items",
    Code.LORA_NOT_FOUND: "LORA_DIR has no such file, or the worker lacks a distilled LoRA for `draft`",
    Code.LORA_DOWNLOAD_FAILED: "the file could not be downloaded",
    Code.LORA_INVALID: "not a safetensors file (a web page, for example), cut short, or with numbers that are not finite",
    Code.LORA_INCOMPATIBLE: "keys or shapes do not fit this model",
    Code.CONTROL_IMAGE_REQUIRED: "the model needs `ctrl_img`",
    Code.CONTROL_IMAGE_INVALID: "`ctrl_img` or `last_img` cannot be downloaded or decoded",
    Code.AI_TOOLKIT_REQUIRED: "at start: there is no usable ai-toolkit checkout",
    Code.CHECKPOINT_NOT_FOUND: "at start: weights are missing",
    Code.STORAGE_NOT_CONFIGURED: "at start: a worker in the cloud has no bucket",
    Code.UPLOAD_FAILED: "the upload failed and the file is kept; at start: the bucket rejects writes",
    Code.OUT_OF_MEMORY: "the job is too large for the device",
    Code.TIMEOUT: "the job took longer than JOB_TIMEOUT, or would",
    Code.CANCELLED: "the job was stopped",
    Code.INTERNAL: "internal error; the worker's log has the traceback",
}
"""The meaning of each code, for the documentation."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a request: the code, the path of the field (`prompts[1].width`), the rule and the remedy."""

    code: Code
    field: str
    text: str

    def __str__(self) -> str:
        return f"`{self.field}`: {self.text}" if self.field else self.text


class Stopped(Exception):
    """The job was cancelled or ran out of time, and its threads must stop."""


class WorkerError(Exception):
    """Ends a job. The client gets its `str()`."""

    def __init__(self, code: Code, message: str, problems: Sequence[Problem] = ()) -> None:
        self.code = code
        self.problems = problems
        self.is_reported = False
        """Whether the error has been logged."""
        # The cloud drops a whole result that is not valid UTF-8, and a client can send lone surrogates.
        self.message = message.encode("utf-8", "replace").decode("utf-8")
        super().__init__(f"{code}: {self.message}")

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> WorkerError:
        """Return one error that lists every problem, under the code that comes first in Code."""
        if len(problems) == 1:
            return cls(problems[0].code, str(problems[0]), problems)
        first = min((problem.code for problem in problems), key=list(Code).index)
        lines = [
            f"({number}) {'' if problem.code is first else f'{problem.code}: '}{problem}"
            for number, problem in enumerate(problems, 1)
        ]
        return cls(first, f"{len(problems)} problems: " + "; ".join(lines), problems)
