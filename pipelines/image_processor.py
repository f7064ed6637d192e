"""The pixels that CLIP sees, resized as the trainer's image processor does it: on uint8 tensors, and not by Pillow."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import BatchFeature


class TensorImageProcessor:
    """Takes the numbers of a CLIPImageProcessor: resize the short edge, cut out the centre, normalise."""

    def __init__(self, processor: Any) -> None:
        self._edge = processor.size["shortest_edge"]
        self._crop = (processor.crop_size["height"], processor.crop_size["width"])
        self._factor = processor.rescale_factor
        self._mean, self._std = processor.image_mean, processor.image_std

    def __call__(self, images: Image.Image | list[Image.Image], return_tensors: str = "pt") -> BatchFeature:
        """RGB images → `pixel_values`: float32 [n, 3, crop, crop]."""
        given = images if isinstance(images, list) else [images]
        return BatchFeature({"pixel_values": torch.stack([self._pixels(image) for image in given])})

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
        height, width = pixels.shape[1:]
        long = int(self._edge * max(height, width) / min(height, width))
        size = (self._edge, long) if height <= width else (long, self._edge)
        pixels = interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0]
        top, left = (round((there - wanted) / 2.0) for there, wanted in zip(size, self._crop, strict=True))
        pixels = pixels[:, top : top + self._crop[0], left : left + self._crop[1]]
        mean, std = (torch.tensor(values).view(3, 1, 1) * (1.0 / self._factor) for values in (self._mean, self._std))
        normalised: torch.Tensor = (pixels.float() - mean) / std
        return normalised
