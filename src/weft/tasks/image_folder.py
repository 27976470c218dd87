"""`image-folder:DIR`: one folder per class with image files: DIR/<class>/<any name>.png (or .jpg,
.bmp, ...).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..errors import WeftError
from .base import Task, divide
from .image_decoding import decode

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")

# Images too, which are not read; leaving them out in silence would be a smaller data set.
UNREAD = (
    ".heic",
    ".heif",
    ".avif",
    ".jfif",
    ".jp2",
    ".jxl",
    ".svg",
    ".psd",
    ".raw",
    ".dng",
    ".npy",
)


@dataclass(frozen=True)
class Stored:
    """An image that is opened on demand: a file, or the bytes of one named `name`."""

    name: str
    data: bytes | None = field(default=None, repr=False)

    def read(self) -> bytes:
        """Returns the encoded image. Raises WeftError if the file cannot be read."""
        if self.data is not None:
            return self.data
        try:
            return Path(self.name).read_bytes()
        except OSError as error:
            raise WeftError(f"{self.name} cannot be read: {error.strerror}.") from None

    def open(self) -> Image.Image:
        """Returns the image in grey or RGB, 8 bits. Raises WeftError as `image_decoding.decode`."""
        return decode(self.read(), self.name)


def load_image_folder(path: Path, test: Path | None) -> Task:
    """Reads the folder. `test` is a second folder with the same classes, or None to hold out a
    part.

    Raises WeftError if there are no class folders, if a class has no images, or if a file is no
    image.
    """
    where = f"image-folder:{path}"
    images, labels = _read_images(path)
    held = None if test is None else _read_images(test)
    classes, splits, notes = divide(where, images, labels, held)
    return Task(where, "image", classes, splits, tuple(notes))


def _read_images(path: Path) -> tuple[list[Image.Image], list[str]]:
    files, labels = listed(path)
    return [file.open() for file in files], labels


def listed(path: Path) -> tuple[list[Stored], list[str]]:
    """Returns every image file of every class folder, not opened, and the folders' names. Raises
    WeftError if there are none.
    """
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise WeftError(
            f"{path} has no sub-folders. Put the images of each class into its own folder: "
            f"{path}/<class>/<name>.png"
        )
    images: list[Stored] = []
    labels: list[str] = []
    for folder in folders:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        unread = next((p for p in folder.iterdir() if p.suffix.lower() in UNREAD), None)
        if unread is not None:
            raise WeftError(f"{unread} is not read; the formats are {', '.join(SUFFIXES)}.")
        if not files:
            have = sorted({p.suffix for p in folder.iterdir()})[:5]
            raise WeftError(
                f"{folder} has no image ({', '.join(SUFFIXES)}); found {have or 'nothing'}."
            )
        images += [Stored(str(file)) for file in files]
        labels += [folder.name] * len(files)
    return images, labels
