"""A PostgreSQL server for the tests: in a directory of its own, database_errors through a socket there and
nothing else.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OPTIONS = (
    "-c listen_addresses='' -c fsync=off -c synchronous_commit=off -c full_page_writes=off "
    "-c unix_socket_directories={folder}"
)


def programs() -> Path | None:
    """Where initdb and pg_ctl are: Debian keeps them out of PATH."""
    on_path = shutil.which("initdb")
    found = [Path(on_path).resolve().parent] if on_path else []
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next(
        (
            folder
            for folder in found
            if (folder / "pg_ctl").is_file() and (folder / "initdb").is_file()
        ),
        None,
    )


@contextmanager
def server(where: Path) -> Iterator[str]:
    """The URL of a running server, which refuses to run as root and then runs as another user."""
    user = _other_user() if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="weft-pg-"))  # short, as a socket's path must be
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
    as_user: dict[str, Any] = (
        {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user is not None else {}
    )

    def run(*words: str) -> None:
        subprocess.run(
            words,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            **as_user,
        )

    data = str(folder / "data")
    try:
        run(
            str(where / "initdb"),
            "-D",
            data,
            "-U",
            "weft",
            "-A",
            "trust",
            "--no-sync",
            "-E",
            "UTF8",
            "--locale=C",
        )
        run(
            str(where / "pg_ctl"),
            "-D",
            data,
            "-w",
            "-l",
            str(folder / "log"),
            "-o",
            OPTIONS.format(folder=folder),
            "start",
        )
        try:
            yield f"postgresql+psycopg://weft@/postgres?host={folder}"
        finally:
            run(str(where / "pg_ctl"), "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _other_user() -> pwd.struct_passwd:
    names = [entry.pw_name for entry in pwd.getpwall()]
    return pwd.getpwnam("postgres" if "postgres" in names else "nobody")
