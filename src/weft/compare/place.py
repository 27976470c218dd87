"""Where the study of a comparison is: a SQLite file in the output directory, or a PostgreSQL
database.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, WeftError
from .locks import file_lock, postgres_lock

FILE, NAME = "study.db", "weft-compare"
LOCK = "study"
WAIT = 60.0  # seconds that one process waits for another's write to a SQLite file
DRIVER = "postgresql+psycopg"
# Times are compared in the database's clock, and so in one zone. Of a machine that is cut off,
# PostgreSQL learns within two minutes and frees its locks; without these settings the kernel's
# default is two hours.
SESSION = "-c timezone=utc -c tcp_keepalives_idle=30 -c tcp_keepalives_interval=15 -c tcp_keepalives_count=6"


@dataclass(frozen=True)
class Place:
    """`url` is None for the file in `out`; `name` tells the studies of one database apart."""

    out: Path
    url: str | None = None
    name: str = NAME

    @property
    def file(self) -> Path:
        return self.out / FILE

    def __str__(self) -> str:
        """For people: without the password."""
        if self.url is None:
            return str(self.file)
        from sqlalchemy import make_url

        return f"{make_url(self.url).render_as_string(hide_password=True)}#{self.name}"

    def engine_arguments(self) -> tuple[str, dict[str, Any]]:
        """URL and keywords of sqlalchemy's create_engine."""
        if self.url is not None:
            return self.url, {"pool_pre_ping": True, "connect_args": {"options": SESSION}}
        from sqlalchemy.pool import NullPool

        def connect() -> (
            sqlite3.Connection
        ):  # a path in the URL would have to be spelt otherwise where it has ? or %
            return sqlite3.connect(self.file, timeout=WAIT, check_same_thread=False)

        return "sqlite:///study.db", {"creator": connect, "poolclass": NullPool}

    def lock(self, engine: Any, what: str = LOCK) -> AbstractContextManager[None]:
        return (
            file_lock(self.out, what)
            if self.url is None
            else postgres_lock(engine, f"{self.name} {what}")
        )


def parse_study(text: str) -> tuple[str, str]:
    """`postgresql+psycopg://user@host/database#name` as URL and name. Raises ConfigError."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    url, _, name = text.partition("#")
    try:
        read = make_url(url)
    except ArgumentError:
        read = None
    if read is None or read.drivername not in ("postgresql", DRIVER) or not read.database:
        raise ConfigError(
            f"--study: write {DRIVER}://user:password@host/database, or the same with #NAME for "
            "one of "
            "several studies in a database. Without --study the study is a file in --out."
        )
    import psycopg  # noqa: F401 - so that a missing driver is told now

    return read.set(drivername=DRIVER).render_as_string(hide_password=False), name or NAME


@contextmanager
def reached(place: Place) -> Iterator[None]:
    """What goes wrong between us and the database, in one line. Raises WeftError."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = (
            error.__cause__
            if isinstance(error, StorageInternalError) and error.__cause__
            else error
        )
        said = " ".join(str(getattr(cause, "orig", None) or cause).split())
        raise WeftError(
            f"the study {place} cannot be used: {said}. What had finished is in it."
        ) from None
