"""The bytes of an image file as a grey or RGB image of 8 bits.

    16 bits, grey        scaled: 65535 becomes 255 (files that store 12 bits of them stay dark)
    16 bits, RGB         the upper 8 bits, as Pillow reads them
    palette, YCbCr       as RGB; an alpha channel is dropped
    CMYK, Lab, 32 bits, floats, animations, several pages    refused

What is refused has no one meaning as 8-bit RGB: the range of its numbers, its profile, or which of
its pictures is meant, is not known. The second picture in a camera's MPO file (a preview, the other
eye) is left out.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image

from ..errors import WeftError

GREY = ("1", "L")
COLOUR = ("P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # 16 bits; older versions of Pillow say "I"
DEEP_FORMATS = ("PNG", "PPM")
CURE = "Save it as an 8-bit RGB or grey image."
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # of TIFF


def decode(data: bytes, name: str) -> Image.Image:
    """Returns the image in grey ("L") or RGB. `name` is the file's, for messages.

    Raises WeftError if it is no image, has more pixels than Pillow's limit for decompression bombs,
    several frames, or numbers without a known range.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Other oddities of a file that can be read, such as unknown metadata.
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with Image.open(io.BytesIO(data)) as image:
                refused = _refused(image)
                if refused is None:
                    image.load()
                    return _eight_bits(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise WeftError(
            f"{name} has more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels, which may be an attack on "
            "the memory; scale it down."
        ) from None
    except Exception as error:  # Pillow's plugins raise SyntaxError, struct.error and others
        raise WeftError(f"{name} cannot be read as an image: {error}") from None
    raise WeftError(f"{name} {refused}")


def _refused(image: Any) -> str | None:
    """Why an image that has been opened is not read, or None."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        return f"has {frames} frames, and one image is expected. Save the frame that is meant."
    if image.mode in (*GREY, *COLOUR) or _is_deep(image):
        return None
    what = {
        "F": "has floating-point numbers, whose range is not known",
        "I": "has 32-bit numbers, whose range is not known",
        "CMYK": "is in CMYK, whose colours need the profile of a printer",
    }.get(image.mode, f"has the mode {image.mode!r}, which is neither grey nor RGB")
    return f"{what}. {CURE}"


def _is_deep(image: Any) -> bool:
    if image.mode in DEEP:
        return image.format in (*DEEP_FORMATS, "TIFF")
    return image.mode == "I" and image.format in DEEP_FORMATS


def _eight_bits(image: Any) -> Image.Image:
    if not _is_deep(image):
        found: Image.Image = image.convert("L" if image.mode in GREY else "RGB")
        return found
    values = np.asarray(image).astype(np.int64)
    if (
        getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    ):  # Pillow leaves it as it is
        values = 65535 - values
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
