"""Images for one model: through its image processor, or resized and scaled if it has none.

A split up to KEPT_BYTES is processed once and kept as floats. A larger one is processed batch by
batch, every time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import WeftError
from .base import Labelled, Split, WithLabels, data_digest
from .image_folder import Stored

KEPT_BYTES = 2**32


@dataclass(frozen=True)
class ImageSplit(WithLabels):
    """pixels [n, channels, height, width] float32, labels [n] int64."""

    pixels: Tensor

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Returns pixel_values [n, channels, height, width] for these rows [n]."""
        return {"pixel_values": self.pixels[rows]}

    @cached_property
    def _fingerprint(self) -> str:
        return data_digest(self.labels, self.pixels)

    def fingerprint(self) -> str:
        return self._fingerprint


@dataclass(frozen=True)
class StreamedSplit(WithLabels):
    """A split that is too large to keep in memory: items (PIL images or `Stored`), and a function
    that computes pixels [n, channels, height, width] from images.
    """

    items: Sequence[Any]
    make: Callable[[Sequence[Image.Image]], Tensor]

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Returns pixel_values [n, channels, height, width] for these rows [n], read from their
        files.
        """
        return {"pixel_values": self.make([open_image(self.items[i]) for i in rows.tolist()])}

    @cached_property
    def _fingerprint(self) -> str:
        """Over the encoded images, and the pixels of the first one, which represent the processing."""
        sha = hashlib.sha256()
        for item in self.items:
            sha.update(
                hashlib.sha256(item.read() if isinstance(item, Stored) else item.tobytes()).digest()
            )
        read = torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)
        return data_digest(self.labels, read, self.make([open_image(self.items[0])]))

    def fingerprint(self) -> str:
        return self._fingerprint


def open_image(item: Any) -> Image.Image:
    """Returns the PIL image, opened if necessary. Raises WeftError if it is no image."""
    image: Image.Image = item.open() if isinstance(item, Stored) else item
    return image


def encode(split: Split, config: Any, processor: Any | None) -> Labelled:
    """Encodes a split of images for the model of this `config`. `processor` is that of
    `transformers`, or None.
    """

    def make(images: Sequence[Image.Image]) -> Tensor:
        """Returns pixels [n, channels, height, width] of n images."""
        return plain(images, config) if processor is None else _processed(images, processor)

    labels = torch.tensor(split.labels, dtype=torch.int64)
    one = make([open_image(split.items[0])])
    if len(split) * one.numel() * one.element_size() > KEPT_BYTES:
        return StreamedSplit(labels, split.items, make)
    parts = [
        make([open_image(item) for item in split.items[start : start + 64]])
        for start in range(0, len(split), 64)
    ]
    return ImageSplit(labels, torch.cat(parts))


def plain(images: Sequence[Image.Image], config: Any) -> Tensor:
    """Returns images [n, channels, height, width] in [-1, 1], resized (bilinear) to the model's
    size, in grey or RGB as it needs.

    Raises WeftError if the model needs another number of channels, or has no image size.
    """
    height, width = image_size(config)
    channels = int(getattr(config, "num_channels", 3))
    if channels not in (1, 3):
        raise WeftError(
            f"{type(config).__name__} needs {channels} channels; images can have 1 (grey) "
            "or 3 (RGB)."
        )
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
    """Returns (height, width) from a model's configuration. Raises WeftError if it has none."""
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise WeftError(
        f"{type(config).__name__} has no image_size, so images cannot be resized for it. Put a "
        "preprocessor_config.json into its folder."
    )


def _processed(images: Sequence[Image.Image], processor: Any) -> Tensor:
    made = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
    pixels: Tensor = made["pixel_values"].float()
    return pixels
