"""Directories that are written as a whole, as `weft export` and `weft merge` do."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .files import flush, leftovers


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes `path`, which must not exist or be empty, at the
    end of the block; it is whole or absent.

    What killed processes left of earlier attempts is removed. Raises OSError, also for a full disk
    that safetensors reports.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if re.fullmatch(rf"\.{re.escape(path.name)}\.\d+-[0-9a-f]{{8}}\.tmp", left.name):
            with _lock_of(left) as free:
                if free:
                    shutil.rmtree(left, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    whole = temporary / "whole"  # a save locks the directory that it writes into
    whole.mkdir(parents=True)
    try:
        with _lock_of(temporary):
            try:
                yield whole
            except SafetensorError as error:
                raise OSError(str(error)) from None
            if path.is_dir():
                for left in leftovers(path):
                    shutil.rmtree(left)
                path.rmdir()
            os.replace(whole, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush(path.parent)


def is_taken(path: Path) -> bool:
    """Returns whether there is anything at a path beside what interrupted saves left."""
    if not path.exists() and not path.is_symlink():
        return False
    return not path.is_dir() or {*path.iterdir()} != {*leftovers(path)}


@contextlib.contextmanager
def _lock_of(directory: Path) -> Iterator[bool]:
    """Tries to lock a directory, and yields whether nobody else holds its lock."""
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:  # somebody has removed it
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or a file system without locks
            yield False
        else:
            yield True
    finally:
        os.close(handle)
