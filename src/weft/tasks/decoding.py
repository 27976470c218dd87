"""The bytes of a text file as text: UTF-8, or UTF-16 and UTF-32 with a byte order mark.

Nothing is guessed. Any other encoding is an error with the line and the command that converts it.
"""

from __future__ import annotations

import codecs
import gzip
import shlex
import zlib
from pathlib import Path

from ..errors import WeftError

_MARKS = (  # the longer ones first, since UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def read_text(path: Path) -> str:
    """Returns the whole file with line feeds as line ends and without a byte order mark; a name
    that ends in .gz is decompressed.

    Raises WeftError if it cannot be read, is no valid gzip file, or has another encoding.
    """
    try:
        held = path.read_bytes()
        if path.suffix.lower() == ".gz":
            held = gzip.decompress(held)
    except gzip.BadGzipFile as error:
        raise WeftError(f"{path} ends in .gz but is not a gzip file: {error}") from None
    except (EOFError, zlib.error) as error:
        raise WeftError(f"{path} is a damaged gzip file: {error}") from None
    except OSError as error:
        raise WeftError(f"{path} cannot be read: {error.strerror}.") from None
    return _decoded(held, path).replace("\r\n", "\n")


def _decoded(held: bytes, path: Path) -> str:
    encoding = next((name for mark, name in _MARKS if held.startswith(mark)), "utf-8")
    try:
        text = held.decode(encoding)
    except UnicodeDecodeError as error:
        line = held[: error.start].count(b"\n") + 1
        what = f"{path}, line {line}: byte 0x{held[error.start]:02x} is no {encoding.upper()}"
        if encoding != "utf-8":
            raise WeftError(f"{what}, which the file's first bytes promise.") from None
        raise WeftError(f"{what}. {_cure(path, _likely_encoding(held))}") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise WeftError(
            f"{path}, line {line}: a NUL character. {_cure(path, _likely_encoding(held))}"
        )
    return text


def _likely_encoding(held: bytes) -> str:
    """What the encoding may be, for a command that the user checks."""
    start = held[:4096]
    if start[1::2].count(0) > len(start) / 4:
        return "utf-16le"
    return "utf-16be" if start[::2].count(0) > len(start) / 4 else "cp1252"


def _cure(path: Path, encoding: str) -> str:
    unpack = f"zcat {shlex.quote(path.name)} | " if path.suffix.lower() == ".gz" else ""
    source = "" if unpack else f" {shlex.quote(path.name)}"
    return (
        f"Save it as UTF-8; if it is {encoding}: {unpack}iconv -f {encoding} -t utf-8{source} > "
        f"{shlex.quote('utf8-' + path.name.removesuffix('.gz'))}"
    )
