"""Models that the benchmarks need and `transformers` does not have, as classes of its kind."""

from __future__ import annotations

from functools import cache


@cache
def register() -> None:
    """Makes the classes known to the Auto classes of `transformers`, which this imports."""
    from . import vl_bart

    vl_bart.register()
