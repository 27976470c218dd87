"""Images as people have them: scaled right, or refused with the reason and the cure."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from weft.errors import WeftError
from weft.tasks.image_decoding import decode
from weft.tasks.image_folder import Stored, load_image_folder

SIXTEEN = np.array([[0, 128, 129, 32768], [65535, 257, 514, 65000]], dtype=np.uint16)


def saved(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(form):
    found = decode(saved(Image.fromarray(SIXTEEN), form), "a")
    assert found.mode == "L"
    assert np.asarray(found).tolist() == np.rint(SIXTEEN / 257).astype(int).tolist()


def test_sixteen_bits_in_which_0_is_white():
    data = saved(Image.fromarray(SIXTEEN), "TIFF", tiffinfo={262: 0})
    assert np.asarray(decode(data, "a"))[1, 0] == 0 and np.asarray(decode(data, "a"))[0, 0] == 255


def test_sixteen_bits_of_colour():
    """Pillow writes none, so the file is written here: one red pixel of 0xffff, 0x8000, 0."""
    import struct
    import zlib

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">HHH", 65535, 32768, 0)))
    found = decode(data + chunk(b"IEND", b""), "a")
    assert (found.mode, found.getpixel((0, 0))) == ("RGB", (255, 128, 0))


@pytest.mark.parametrize(
    ("image", "form", "says"),
    [
        (Image.fromarray(np.array([[0.0, 0.5]], np.float32)), "TIFF", "floating-point numbers"),
        (Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF", "32-bit numbers"),
        (Image.new("CMYK", (4, 4)), "JPEG", "is in CMYK"),
        (Image.new("CMYK", (4, 4)), "TIFF", "is in CMYK"),
        (Image.new("LAB", (4, 4)), "TIFF", "mode 'LAB'"),
    ],
)
def test_numbers_without_a_known_meaning_are_refused(image, form, says):
    with pytest.raises(WeftError, match=rf"^a\.x .*{says}.* Save it as an 8-bit RGB"):
        decode(saved(image, form), "a.x")


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_no_image(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:])
    with pytest.raises(WeftError, match="a has 3 frames, and one image is expected"):
        decode(data, "a")
    assert decode(saved(frames[0], form), "a").mode == "RGB"


def test_the_first_picture_of_a_camera_s_file_is_the_photo():
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("white", "black"))
    found = decode(saved(first, "MPO", save_all=True, append_images=[second]), "a")
    assert found.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "form", "wanted"),
    [
        ("1", "PNG", "L"),
        ("L", "PNG", "L"),
        ("P", "PNG", "RGB"),
        ("RGBA", "PNG", "RGB"),
        ("LA", "PNG", "RGB"),
        ("RGB", "JPEG", "RGB"),
        ("L", "JPEG", "L"),
    ],
)
def test_usual_images(mode, form, wanted):
    found = decode(saved(Image.new("RGB", (4, 4), "white").convert(mode), form), "a")
    assert found.mode == wanted and np.asarray(found).min() == 255


def test_a_decompression_bomb_is_refused_before_it_is_decompressed(monkeypatch):
    data = saved(Image.new("1", (400, 400)), "PNG")
    for limit in (100_000, 1000):  # Pillow warns above the limit, and refuses above twice of it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(WeftError, match=f"a has more than {limit:,} pixels"):
                decode(data, "a")


def test_a_file_that_is_none_or_damaged_names_itself(tmp_path):
    good = saved(Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)), "PNG")
    rng = np.random.default_rng(0)
    refused = []
    for number in range(300):
        data = bytearray(good)
        for place in rng.integers(0, len(data), 1 + number % 9):
            data[place] = rng.integers(256)
        try:
            assert decode(bytes(data[: len(data) - number % 3]), "a").mode in ("L", "RGB")
        except WeftError as error:
            refused.append(str(error))
    assert len(refused) > 100 and all(text.startswith("a ") for text in refused)
    for data in (b"", b"text", good[:40], good[:-30]):
        with pytest.raises(WeftError, match=r"a\.png cannot be read as an image"):
            Stored("a.png", data).open()


def test_a_folder_with_an_animation_names_the_file(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        frames[0].save(tmp_path / name / "1.png")
    frames[0].save(tmp_path / "b" / "2.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(WeftError, match=r"b.2\.gif has 2 frames"):
        load_image_folder(tmp_path, None)
    (tmp_path / "a" / "3.HEIC").write_bytes(b"")
    with pytest.raises(WeftError, match=r"a.3\.HEIC is not read; the formats are \.png"):
        load_image_folder(tmp_path, None)
