"""One finished comparison on the embedded default, shared by the tests that read it."""

from __future__ import annotations

import pytest
from comparing import TINY, Finished, compare


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    return compare(folder / "out", *TINY, "--json", str(folder / "copy.json"))
