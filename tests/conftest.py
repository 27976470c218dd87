"""Set-up for all tests: one thread a process, no network, reproducible examples."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "weft",
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("weft")


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same global generator and leaves torch's default dtype alone."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout; a test that needs it is skipped where it is
    missing.
    """
    folder = Path(__file__).resolve().parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder `shared` (facts and design notes) is not beside this checkout")
    return folder
