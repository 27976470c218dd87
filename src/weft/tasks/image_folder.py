"""`image-folder:DIR`: one folder per class, image files inside: DIR/<class>/<any name>.png (or .jpg, .bmp, ...)."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..errors import WeftError
from .base import Task, divide

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


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
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise WeftError(f"{path} has no sub-folders. Put the images of each class into a folder of its own: "
                        f"{path}/<class>/<name>.png")
    images, labels = [], []
    for folder in folders:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        if not files:
            have = sorted({p.suffix for p in folder.iterdir()})[:5]
            raise WeftError(f"{folder} holds no image ({', '.join(SUFFIXES)}); found {have or 'nothing'}.")
        images += [_open(file) for file in files]
        labels += [folder.name] * len(files)
    return images, labels


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise WeftError(f"{file} cannot be read as an image: {error}") from None
