"""One finished comparison on the embedded default, and a PostgreSQL server, shared by the tests
that need them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from comparing import TINY, Finished, compare
from postgres import programs, server


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    return compare(folder / "out", *TINY, "--json", str(folder / "copy.json"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server that was started for the tests."""
    pytest.importorskip(
        "psycopg", reason="psycopg is not installed, so nothing was tested with PostgreSQL"
    )
    where = programs()
    if where is None:
        pytest.skip("PostgreSQL (initdb, pg_ctl) is not installed, so nothing was tested with it")
    with server(where) as url:
        yield url
