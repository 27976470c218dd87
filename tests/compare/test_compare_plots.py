"""Labels of the pictures: apart from each other, and near what they name."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from weft.compare.report.labels import spread


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=9))
def test_labels_are_pushed_apart_and_stay_in_order(wanted: list[float]) -> None:
    places = spread(sorted(wanted), 10, 0, 100)
    assert all(b - a >= 10 - 1e-5 for a, b in pairwise(places))
    assert places[0] >= -1e-6
    assert places[-1] <= 100 + 0.1


def test_labels_with_room_stay_where_they_belong() -> None:
    assert spread([5.0, 20.0, 60.0], 10, 0, 100) == [5.0, 20.0, 60.0]
