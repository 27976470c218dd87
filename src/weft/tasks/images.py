"""Images for one model: through its own image processor, or resized and scaled where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import WeftError
from .base import Split, digest


@dataclass(frozen=True)
class ImageSplit:
    """pixels [n, channels, height, width] float32, labels [n] int64."""

    pixels: Tensor
    labels: Tensor

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[rows]}

    @cached_property
    def _fingerprint(self) -> str:
        return digest(self.labels, self.pixels)

    def fingerprint(self) -> str:
        return self._fingerprint


def encode(split: Split, config: Any, processor: Any | None) -> ImageSplit:
    """A split of PIL images for the model of this `config`; `processor` as `transformers` loads it, or None."""
    pixels = plain(split.items, config) if processor is None else _processed(split.items, processor)
    return ImageSplit(pixels, torch.tensor(split.labels, dtype=torch.int64))


def plain(images: Sequence[Image.Image], config: Any) -> Tensor:
    """[n, channels, height, width] in [-1, 1]: resized (bilinear) to the model's image size, grey or RGB as it wants."""
    height, width = image_size(config)
    channels = int(getattr(config, "num_channels", 3))
    if channels not in (1, 3):
        raise WeftError(f"{type(config).__name__} wants {channels} channels; images can be made with 1 (grey) or 3 (RGB).")
    mode = "L" if channels == 1 else "RGB"
    arrays = []
    for image in images:
        image = image.convert(mode)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        arrays.append(np.asarray(image, dtype=np.float32).reshape(height, width, channels))
    stacked = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return stacked / 127.5 - 1


def image_size(config: Any) -> tuple[int, int]:
    """(height, width) that a model's configuration asks for."""
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise WeftError(f"{type(config).__name__} says no image_size, so images cannot be resized for it. Put a "
                    "preprocessor_config.json beside its config.json.")


def _processed(images: Sequence[Image.Image], processor: Any) -> Tensor:
    parts = [processor(images=[image.convert("RGB") for image in images[start:start + 64]], return_tensors="pt")
             for start in range(0, len(images), 64)]
    return torch.cat([part["pixel_values"].float() for part in parts])
