"""The frozen image tower of the world of shapes: what CLIP is to VL-BART's real tasks.

It knows the looks of all colours and shapes, one feature per cell, so that what a model has to
learn is language. `scripts/pretrain_shapes.py` trains it on the cells' attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...errors import WeftError
from .world import CELL, COLOURS, SHAPES, SIDE, SIZES

if TYPE_CHECKING:
    from PIL import Image

WIDTH = 64  # numbers per feature
ATTRIBUTES = {"colour": len(COLOURS) + 1, "shape": len(SHAPES) + 1, "size": len(SIZES) + 1}
_FILE = "tower.safetensors"


class Tower(nn.Module):
    """Four convolutions from 48 x 48 pixels to 3 x 3 features, and a head for pretraining."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 16, 32, 48, WIDTH)
        parts: list[nn.Module] = []
        for given, made in pairwise(sizes):
            parts += [
                nn.Conv2d(given, made, 3, stride=2, padding=1),
                nn.GroupNorm(4, made),
                nn.GELU(),
            ]
        self.body = nn.Sequential(*parts[:-1])
        self.head = nn.Linear(WIDTH, sum(ATTRIBUTES.values()))

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns features [n, 9, width], row by row, of images [n, 3, 48, 48] in [-1, 1]."""
        found: Tensor = self.body(pixels)
        return found.flatten(2).transpose(1, 2)


def as_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Returns [n, 3, 48, 48] in [-1, 1]. Raises WeftError if an image has another size."""
    import numpy as np

    side = SIDE * CELL
    wrong = next((image.size for image in images if image.size != (side, side)), None)
    if wrong is not None:
        raise WeftError(
            f"the tower of the shapes reads images of {side} x {side} pixels; one has "
            f"{wrong[0]} x {wrong[1]}."
        )
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def features(tower: Tower, images: Sequence[Image.Image], batch: int = 256) -> Tensor:
    """Returns features [images, 9, width]."""
    parts = [
        tower(as_pixels(images[start : start + batch])) for start in range(0, len(images), batch)
    ]
    return torch.cat(parts)


def cell_boxes() -> Tensor:
    """Returns the cells' boxes [9, 4] in [0, 1], x1, x2, y1, y2, row by row."""
    starts = [(x / SIDE, y / SIDE) for y in range(SIDE) for x in range(SIDE)]
    return torch.tensor([[x, x + 1 / SIDE, y, y + 1 / SIDE] for x, y in starts])


def load_tower(folder: Path) -> Tower:
    """Reads the tower that `save_tower` wrote, in eval mode, frozen. Raises WeftError if it is not
    there.
    """
    from safetensors.torch import load_file

    path = folder / _FILE
    if not path.is_file():
        raise WeftError(f"{folder}: there is no {_FILE}, the image tower that the shapes need.")
    with torch.device("cpu"):
        tower = Tower()
    tower.load_state_dict(load_file(path))
    return tower.requires_grad_(False).eval()


def save_tower(tower: Tower, folder: Path) -> None:
    """Writes the tower into a folder."""
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tower.state_dict().items()}, folder / _FILE)
