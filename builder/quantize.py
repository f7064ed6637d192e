"""Keep the linear layers of a safetensors file as the codes that a worker with QUANTIZE would make of them at its start.

The codes are made of bf16 numbers, in which a worker on a GPU runs. The file says in its metadata what was done.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from builder.convert import KEPT_IN_FLOAT32
from pipelines.catalog import ModelSpec
from pipelines.quantized import FORMATS
from pipelines.trained import quantization_in
from pipelines.weights import CODES, is_linear


class Codes:
    """How the files of one component are quantized."""

    def __init__(self, spec: ModelSpec, part: str, format: str) -> None:
        quantization = quantization_in(spec, format)
        assert quantization
        stored = quantization.stored_as(part)
        assert stored
        self.format = format
        self._part, self._quantization, self._stored = part, quantization, stored

    @torch.no_grad()
    def write(self, source: Path, target: BinaryIO) -> str:
        """Write the file with codes to `target`, an open file, and return its sha256. Its codes are in memory at once.

        Raises ValueError for a file that is not in safetensors format.
        """
        kept: dict[str, torch.Tensor] = {}
        try:
            with safe_open(source, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    kept |= self._kept(key, file.get_tensor(key))
        except SafetensorError as error:
            raise ValueError(f"the file is not in safetensors format: {error}") from error
        layers = sum(key.endswith(".code_0") for key in kept)
        note = json.dumps({**vars(self._stored), "layers": layers, "torch": torch.__version__})
        # One text: of several, the library writes another order each time. And by the name: bytes would take memory twice.
        save_file(kept, target.name, {CODES: note})
        with Path(target.name).open("rb") as written:
            return hashlib.file_digest(written, "sha256").hexdigest()

    def _kept(self, key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is kept of a tensor: its codes, or the tensor as `to_bf16` keeps it."""
        format = self._quantization.format_of(self._part, key)
        if format and is_linear(key, tensor.shape):
            codes = FORMATS[format].encode(tensor.to(torch.bfloat16))
            if codes is not None:
                name = key.removesuffix(".weight")
                return {f"{name}.code_{number}": part.contiguous() for number, part in enumerate(codes)}
        if tensor.dtype == torch.float32 and KEPT_IN_FLOAT32.isdisjoint(key.split(".")):
            return {key: tensor.to(torch.bfloat16)}
        return {key: tensor}
