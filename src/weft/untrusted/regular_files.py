"""Files that someone else may have put there: only regular ones are opened, and only up to a size.

A FIFO or a device could block for ever, and an endless or huge file would fill the memory.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a directory"),
)
_ABSENT = (FileNotFoundError, NotADirectoryError)


def kind_of(path: Path) -> str | None:
    """Returns what a path is if it is there and no regular file ("a FIFO"), else None.

    Links are followed; one that leads nowhere is a kind too.
    """
    try:
        mode = path.stat().st_mode
    except _ABSENT:
        return "a link to nothing" if path.is_symlink() else None
    except (OSError, ValueError) as error:  # a loop of links, a name with a NUL
        return f"unreadable ({error})"
    return _kind_of_mode(mode)


def read_bytes(path: Path, most: int) -> bytes:
    """Returns the content of a regular file of at most `most` bytes.

    Raises OSError if it cannot be opened, and ValueError if it is no regular file or is larger.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        kind = _kind_of_mode(found.st_mode)
        if kind is not None:
            raise ValueError(f"it is {kind}, and a regular file is expected")
        if found.st_size > most:
            raise ValueError(f"it has {found.st_size:,} bytes, and at most {most:,} are read")
        data = file.read(most + 1)
        if len(data) > most:  # it grew, or its size is not known before
            raise ValueError(f"it has more than {most:,} bytes")
        return data


def read_text(path: Path, most: int) -> str:
    """Returns the text of a regular UTF-8 file of at most `most` bytes.

    Raises OSError and ValueError as `read_bytes`, the latter also if it is not UTF-8.
    """
    return read_bytes(path, most).decode("utf-8")


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file of any size, in hex digits. Raises OSError."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _kind_of_mode(mode: int) -> str | None:
    if stat.S_ISREG(mode):
        return None
    return next((name for test, name in _KINDS if test(mode)), "no regular file")
