r"""Regular expressions of a file or a configuration, matched against names in bounded time.

Python's matcher goes back and tries again, which takes exponential time for patterns such as
(a+)+b. Three ways avoid that:
- alternatives of plain names ("model\.q_proj|model\.v_proj") are a set of names;
- for a pattern whose number of ways to match is bounded by `WAYS`, Python's matcher is used;
- any other is matched by `sets.py`, which follows all ways at once. It knows no backreferences,
  atomic groups and flags; with one of them the pattern is an error.
"""

from __future__ import annotations

import re
import sys
import warnings
from functools import lru_cache
from typing import Any

from . import sets

if sys.version_info >= (3, 11):
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_parse as parser

LONGEST = 20_000  # characters of a pattern, unless it is a list of plain names
LONGEST_NAME = 4_000
WAYS = 20_000
_PLAIN = re.compile(r"(?:[\w ,/:;<>=!@%&'\"`~#-]|\\[^\w]|\\_)+", re.ASCII)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def check(pattern: str) -> None:
    """Raises ValueError if a pattern is no regular expression, or is too long to be compiled."""
    _compiled(pattern)


def fullmatch(pattern: str, name: str) -> bool:
    """Returns whether a pattern matches the whole of a name.

    Raises ValueError as `check`, and if matching would take too long.
    """
    found = _compiled(pattern)
    if isinstance(found, frozenset):
        return name in found
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a name of {len(name):,} characters")
    compiled, tree = found
    if _ways(tree, len(name))[1] <= WAYS:
        return compiled.fullmatch(name) is not None
    try:
        return sets.matches(tree, name)
    except sets.TooCostly as error:
        raise ValueError(
            f"it repeats what repeats itself or has many alternatives, so matching it could take "
            f"for ever ({error})"
        ) from None


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> frozenset[str] | tuple[re.Pattern[str], Any]:
    """The names of a list of plain names, or the compiled expression and its parse tree."""
    parts = plain_names(pattern)
    if parts is not None:
        return frozenset(parts)
    if len(pattern) > LONGEST:
        raise ValueError(f"it has {len(pattern):,} characters, and at most {LONGEST:,} are allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # possible set operations of a later Python
            return re.compile(pattern), parser.parse(pattern)
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def plain_names(pattern: str) -> list[str] | None:
    """Returns the names that a pattern lists, or None if it is another expression."""
    parts = pattern.split("|")
    if not all(_PLAIN.fullmatch(part) for part in parts):
        return None
    return [_ESCAPE.sub(r"\1", part) for part in parts]


def _ways(tree: Any, n: int) -> tuple[float, float]:
    """Upper bounds on the ways in which a parse tree can match within n characters, and on the work
    to try them all.
    """
    ways, work = 1.0, 1.0
    for op, value in tree:
        one_ways, one_work = _ways_of(str(op), value, n)
        work += ways * one_work
        ways *= one_ways
        if work > WAYS:
            return ways, work
    return ways, work


def _ways_of(op: str, value: Any, n: int) -> tuple[float, float]:
    match op:
        case "BRANCH":
            each = [_ways(branch, n) for branch in value[1]]
            return sum(w for w, _ in each), sum(w for _, w in each)
        case "SUBPATTERN":
            return _ways(value[3], n)
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            low, high, body = value
            most = min(int(high), max(n, int(low))) + 1
            inner, work = _ways(body, n)
            if inner <= 1:
                return most, most * work
            total = float("inf") if most > 16 else sum(inner**k for k in range(most))
            return total, total * work
        case "ATOMIC_GROUP":
            return 1, _ways(value, n)[1]
        case "ASSERT" | "ASSERT_NOT":
            return 1, _ways(value[1], n)[1]
        case "GROUPREF_EXISTS":
            branches = [_ways(branch, n) for branch in value[1:] if branch is not None]
            return sum(w for w, _ in branches) + 1, sum(w for _, w in branches) + 1
    return 1, n if op == "GROUPREF" else 1
