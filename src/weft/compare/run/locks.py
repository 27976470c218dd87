"""Locks shared by all processes of a comparison. The system frees them if their process dies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any


@contextmanager
def file_lock(folder: Path, name: str) -> Iterator[None]:
    """Locks among the processes that see this folder. The kernel frees it with the process."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        yield


@contextmanager
def postgres_lock(engine: Any, name: str) -> Iterator[None]:
    """Locks among the sessions of one database, with an advisory lock that PostgreSQL frees if the
    connection ends.
    """
    from sqlalchemy import text

    number = {"number": int.from_bytes(sha256(name.encode()).digest()[:8], "big", signed=True)}
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SELECT pg_advisory_lock(:number)"), number)
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:number)"), number)
