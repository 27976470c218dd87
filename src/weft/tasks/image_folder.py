"""`image-folder:DIR`: one folder per class, image files inside: DIR/<class>/<any name>.png (or
.jpg, .bmp, ...).
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..errors import WeftError
from .base import Task, divide

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Stored:
    """An image that is opened when it is needed: a file, or the bytes of one from the place
    `name`.
    """

    name: str
    data: bytes | None = field(default=None, repr=False)

    def read(self) -> bytes:
        """The encoded image. Raises WeftError."""
        if self.data is not None:
            return self.data
        try:
            return Path(self.name).read_bytes()
        except OSError as error:
            raise WeftError(f"{self.name} cannot be read: {error.strerror}.") from None

    def open(self) -> Image.Image:
        """Grey or RGB. Raises WeftError: this is no image."""
        try:
            with Image.open(io.BytesIO(self.read())) as image:
                image.load()
                return image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise WeftError(f"{self.name} cannot be read as an image: {error}") from None


def load(path: Path, test: Path | None) -> Task:
    """Read the folder; `test` is a second folder of the same shape, or None to hold a part out.

    Raises WeftError: no class folders, a class without images, a file that is no image.
    """
    where = f"image-folder:{path}"
    images, labels = _read(path)
    held = None if test is None else _read(test)
    classes, splits, notes = divide(where, images, labels, held)
    return Task(where, "image", classes, splits, tuple(notes))


def _read(path: Path) -> tuple[list[Image.Image], list[str]]:
    files, labels = listed(path)
    return [file.open() for file in files], labels


def listed(path: Path) -> tuple[list[Stored], list[str]]:
    """Every image file of every class folder, not opened, and the folders' names. Raises WeftError:
    none of one or both.
    """
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise WeftError(
            f"{path} has no sub-folders. Put the images of each class into a folder of its own: "
            f"{path}/<class>/<name>.png"
        )
    images: list[Stored] = []
    labels: list[str] = []
    for folder in folders:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        if not files:
            have = sorted({p.suffix for p in folder.iterdir()})[:5]
            raise WeftError(
                f"{folder} holds no image ({', '.join(SUFFIXES)}); found {have or 'nothing'}."
            )
        images += [Stored(str(file)) for file in files]
        labels += [folder.name] * len(files)
    return images, labels
