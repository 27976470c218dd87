"""Pictures of samples: checked before training, and opened batch by batch."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import WeftError

_ORIENTATION = 0x0112  # the tag of EXIF data
_MANY = ("GIF", "WEBP", "PNG", "TIFF")  # formats whose files may have several pictures


@dataclass(frozen=True)
class ImageFile:
    """A picture that was decoded once. `size` is (width, height) as it is seen, `digest` 16 hex
    digits over its bytes.
    """

    path: str
    size: tuple[int, int]
    digest: str


def check_image(path: str, where: str) -> ImageFile:
    """Decodes a picture and returns what is known of it. Raises WeftError, naming `where` and the
    file, if it cannot be read whole or has several frames.
    """
    from PIL import Image

    try:
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            size, frames = picture.size, getattr(picture, "n_frames", 1)
            several = frames > 1 and picture.format in _MANY
            turned = picture.getexif().get(_ORIENTATION, 1) >= 5
            if not several:
                picture.draft("RGB", (size[0] // 8, size[1] // 8))  # a JPEG decodes faster
                picture.load()
    except FileNotFoundError:
        raise WeftError(
            f"{where}: there is no image {path!r}. Paths are relative to the folder of the data file."
        ) from None
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, and errors of its own
        raise _unreadable(path, where, error) from None
    if several:
        raise WeftError(
            f"{where}: image {path!r} has {frames} frames, of which the model would see one. Write "
            "the frames as pictures of their own."
        )
    seen = (size[1], size[0]) if turned else size
    return ImageFile(path, seen, hashlib.sha256(data).hexdigest()[:16])


def open_image(path: str, where: str = "a sample") -> Any:
    """Returns a picture in RGB as it is seen, turned by its EXIF data. Raises WeftError."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            turned = ImageOps.exif_transpose(picture)
            return turned.convert("RGB")
    except FileNotFoundError:
        raise WeftError(f"{where}: there is no image {path!r}.") from None
    except Exception as error:
        raise _unreadable(path, where, error) from None


def noise_image(size: tuple[int, int]) -> Any:
    """Returns a picture of this size (width, height) with fixed random pixels."""
    import torch
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator)
    return Image.fromarray(pixels.byte().numpy())


def _unreadable(path: str, where: str, error: Exception) -> WeftError:
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    reason = "it is no picture" if "cannot identify" in first else first
    return WeftError(f"{where}: image {path!r} cannot be read: {reason}.")
