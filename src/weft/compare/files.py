"""Atomic writes."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.files import replace


def write_atomically(path: Path, text: str) -> None:
    """Writes to a temporary file, flushes it to disk and renames it.

    After a crash, either the old or the new file exists, never a part of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
