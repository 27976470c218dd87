"""The location of a study: a SQLite file in the output directory, or a PostgreSQL database."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, WeftError
from ...untrusted.printable import one_line
from .locks import file_lock, postgres_lock

FILE, NAME = "study.db", "weft-compare"
LOCK = "study"
WAIT = 60.0  # seconds that a process waits while another writes to the SQLite file
DRIVER = "postgresql+psycopg"
# UTC, because times are compared in the database's clock. With the keepalive settings, PostgreSQL
# notices within two minutes that a machine is unreachable, and frees its locks; the kernel's default
# is two hours.
SESSION = "-c timezone=utc -c tcp_keepalives_idle=30 -c tcp_keepalives_interval=15 -c tcp_keepalives_count=6"


@dataclass(frozen=True)
class StudyLocation:
    """`url` is None for the file in `out`. `name` distinguishes the studies of one database."""

    out: Path
    url: str | None = None
    name: str = NAME

    @property
    def file(self) -> Path:
        """The SQLite file."""
        return self.out / FILE

    def __str__(self) -> str:
        """Returns the location without the password, for messages."""
        if self.url is None:
            return str(self.file)
        return f"{without_password(self.url)}#{self.name}"

    def engine_arguments(self) -> tuple[str, dict[str, Any]]:
        """Returns the URL and the keyword arguments of sqlalchemy's create_engine."""
        if self.url is not None:
            return self.url, {"pool_pre_ping": True, "connect_args": {"options": SESSION}}
        from sqlalchemy.pool import NullPool

        def connect() -> sqlite3.Connection:  # in a URL, ? and % in a path would need escaping
            return sqlite3.connect(self.file, timeout=WAIT, check_same_thread=False)

        return "sqlite:///study.db", {"creator": connect, "poolclass": NullPool}

    def lock(self, engine: Any, name: str = LOCK) -> AbstractContextManager[None]:
        """Returns a lock that is shared by all processes of the study."""
        return (
            file_lock(self.out, name)
            if self.url is None
            else postgres_lock(engine, f"{self.name} {name}")
        )


def without_password(text: str) -> str:
    """Returns a text with every password in its URLs replaced by ***: that before the host, which
    may contain any character, and those among the fields behind a question mark.
    """
    text = re.sub(r"(://[^:/@\s]*):[^\s]*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:passw|pwd|secret|token)[^=&\s]*=)[^&#\s]*", r"\1***", text)


def parse_study_url(text: str) -> tuple[str, str]:
    """Splits `postgresql+psycopg://user@host/database#name` into URL and name.

    Raises ConfigError if it is no such URL, and ModuleNotFoundError if the driver is not installed.
    """
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    url, _, name = text.partition("#")
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    if parsed is None or parsed.drivername not in ("postgresql", DRIVER) or not parsed.database:
        raise ConfigError(
            f"--study: write {DRIVER}://user:password@host/database, or the same with #NAME for "
            "one of several studies in a database. Without --study the study is a file in --out."
        )
    import psycopg  # noqa: F401 - reports a missing driver now

    return parsed.set(drivername=DRIVER).render_as_string(hide_password=False), name or NAME


@contextmanager
def database_errors(location: StudyLocation) -> Iterator[None]:
    """Turns errors of the database into a WeftError of one line."""
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
        message = without_password(one_line(str(getattr(cause, "orig", None) or cause), 2000))
        raise WeftError(
            f"the study {location} cannot be used: {message}. Finished runs are stored in it."
        ) from None
