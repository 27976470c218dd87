"""An append-only JSONL file: written rows survive a crash of the process.

A row is one `write` and one `fsync`, so a killed process leaves at most one unfinished last line.
It is removed when the file is opened again. Damage anywhere else is an error, because nothing here
causes it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ConfigError, WeftError

Row = dict[str, Any]


class Journal:
    """`rows` are those of the file and all appended ones. One process at a time can open it.

    Raises ConfigError if another process has it open, and WeftError if a line is no JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self.rows = self._read()
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._handle)

    def append(self, row: Row) -> None:
        """Appends a row. It is on the disk when this returns."""
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        while line:  # a nearly full disk may write only a part
            line = line[os.write(self._handle, line) :]
        os.fsync(self._handle)
        self.rows.append(row)

    def _lock(self) -> None:
        """Locks the file. The system frees the lock when the process ends."""
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self.path} is in use by another process. Wait for it, or give another --out."
            ) from None
        except OSError:  # a file system without locks
            return

    def _read(self) -> list[Row]:
        held = self.path.read_bytes()
        whole, _, last = held.rpartition(b"\n")
        lines = whole.split(b"\n") if whole else []
        if last:  # no line end: an editor wrote it, or the process was killed
            try:
                _read_line(last)
            except ValueError:
                os.ftruncate(self._handle, len(held) - len(last))
            else:
                os.write(self._handle, b"\n")
                lines.append(last)
        rows = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(_read_line(line))
            except ValueError as error:
                raise WeftError(
                    f"{self.path}, line {number} is not a JSON object ({error}). Fix or remove it."
                ) from None
        return rows


def _read_line(line: bytes) -> Row:
    row = json.loads(line)  # UnicodeDecodeError and JSONDecodeError are ValueErrors
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}")
    return row
