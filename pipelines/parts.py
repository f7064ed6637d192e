"""The components of a model, loaded from its repos."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]

from pipelines.catalog import ModelSpec, OffloadMode
from pipelines.checkpoints import Checkpoints
from pipelines.clock import timed
from pipelines.pristine import CheckpointFile
from pipelines.quantized import encode_layers, fill_with_codes
from pipelines.trained import Quantization
from pipelines.weights import file_names


class Parts:
    """Loads the components of a model, each from its own repo and to its device before the next one, and times them.

    Files in the model's dtype are mapped, and read to a GPU as they are; of others, one component is in main memory at a time.
    """

    def __init__(
        self,
        spec: ModelSpec,
        checkpoints: Checkpoints,
        dtype: torch.dtype,
        device: torch.device,
        offload_mode: OffloadMode,
        took: dict[str, float],
        quantization: Quantization | None = None,
    ) -> None:
        """`took` gets the seconds of each component. What `offload_mode` moves to the device later stays in main memory.

        `quantization`: which weights are kept as codes.
        """
        self.quantization = quantization
        self.spec = spec
        self.checkpoints = checkpoints
        self.stored = checkpoints.stored()
        self.device = device
        self._dtype = dtype
        self._stay_in_memory = spec.waits_in_memory(offload_mode)
        self._took = took

    def load(self, names: Iterable[str]) -> dict[str, Any]:
        parts = {}
        for name in names:
            with timed(self._took, name):
                parts[name] = self._load(name)
        return parts

    def _load(self, name: str) -> Any:
        source = self.spec.sources[name]
        repo, options = self.checkpoints.repo_of(name), {"subfolder": source.subfolder, "local_files_only": True}
        if name == "tokenizer":
            return transformers.AutoTokenizer.from_pretrained(repo, **options)
        part_class = {
            "transformer": diffusers.WanTransformer3DModel,
            "transformer_2": diffusers.WanTransformer3DModel,
            "vae": diffusers.AutoencoderKLWan,
            "text_encoder": transformers.UMT5EncoderModel,
            "image_encoder": transformers.CLIPVisionModel,
        }[name]
        if name in self.stored:
            part = self._from_codes(name, part_class)
        else:
            part = part_class.from_pretrained(repo, dtype=self._dtype, use_safetensors=True, **options)
        if self.quantization and name not in self.stored:
            encode_layers(part, partial(self.quantization.format_of, name), self.device, self._dtype)
        if name in self._stay_in_memory or self.device.type == "cpu":
            return part
        return CheckpointFile(self.checkpoints.folder_of(name), name).bring(part, self.device)

    def _from_codes(self, name: str, part_class: Any) -> Any:
        """A component of which the files have the codes."""
        folder = self.checkpoints.folder_of(name)
        with init_empty_weights():
            if issubclass(part_class, diffusers.ModelMixin):
                part = part_class.from_config(part_class.load_config(folder, local_files_only=True))
            else:
                part = part_class(part_class.config_class.from_pretrained(folder, local_files_only=True))
        files = [folder / file for file in file_names(folder, name)]
        fill_with_codes(part, files, self.stored[name], self._dtype)
        return part.eval()
