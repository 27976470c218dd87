"""The rules for a column of labels, whichever file it comes from.

Blanks around a label are no part of it. A number counts as JSON writes it (4 is "4"), true and
false as "true" and "false". Labels are all numbers or all names, and a number is always written in
the same way. Numbers that are not whole are scores or classes only if somebody says which. An empty
label, null and NaN are missing values. What stands in `allowed` is a class, whatever it looks like.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from ..errors import WeftError

MISSING = ("", "nan")  # as pandas and others write what is not there
Places = Sequence[str]  # where each label stands, for messages: "data.csv, line 7, column 'label'"


def classes(values: Sequence[Any], places: Places, allowed: Collection[str] = ()) -> list[str]:
    """Returns the names of the labels' classes, one per value. Raises WeftError, naming the place."""
    names = [_name(value, place) for value, place in zip(values, places, strict=True)]
    if allowed:
        return names
    numbers: dict[float, str] = {}
    named = first = None
    for name, place in zip(names, places, strict=True):
        if name.casefold() in MISSING:
            raise WeftError(
                f"{place}: the label is {name!r}, a missing value. Remove the row; if it is a "
                "class, list all of them in model.labels."
            )
        value = _number(name)
        if value is None:
            named = named or (name, place)
            continue
        first = first or (name, place)
        if numbers.setdefault(value, name) != name:
            raise WeftError(
                f"{place}: the label {name!r} is the same number as {numbers[value]!r}. Write it "
                "in one way."
            )
    if named and first:
        raise WeftError(
            f"{named[1]}: the label {named[0]!r} is no number, and {first[0]!r} is one ({first[1]}). "
            "If both are classes, list all of them in model.labels."
        )
    return names


def has_fractions(names: Sequence[str]) -> bool:
    """Returns True if all are numbers and some are not whole, as scores are."""
    values = [_number(name) for name in set(names)]
    return all(v is not None for v in values) and any(
        v is not None and v != round(v) for v in values
    )


def scores(values: Sequence[Any], places: Places) -> list[float]:
    """Returns the labels as numbers. Raises WeftError, naming the place, for one that is none."""
    return [_score(value, place) for value, place in zip(values, places, strict=True)]


def _name(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    what = "a missing value" if value is None or value != value else "neither a class nor a number"
    raise WeftError(f"{place}: the label is {value!r:.60}, {what}. Remove the row.")


def _score(value: Any, place: str) -> float:
    found = _number(value.strip()) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise WeftError(
            f"{place}: the label is {value!r:.60}, which is not a number, and this is a regression."
        )
    return float(found)


def _number(name: str) -> float | None:
    """The finite number that a text is, or None. Digits of other scripts and 1_000 are names."""
    try:
        value = float(name) if name.isascii() and "_" not in name else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
