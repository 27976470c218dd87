"""Matching a parsed regular expression by following all ways at once.

The positions of a text that a part of the expression can reach are the bits of one integer, and
each part maps such a set to the next. So time is polynomial in the lengths of both; a budget bounds
the rest. Without captures, greedy and lazy repeats reach the same positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

BUDGET = 10_000  # parts evaluated per name; patterns in use need a few hundred


class TooCostly(Exception):
    """The budget is spent, or the expression has a part that is not known here."""


def matches(tree: Any, text: str) -> bool:
    """Returns whether a parse tree of Python's `re` matches the whole text. Raises TooCostly."""
    if tree.state.flags & ~32:  # re.UNICODE is always set
        raise TooCostly("it has flags")
    found = _Text(text).after(tree, 1)
    return bool(found >> len(text) & 1)


class _Text:
    def __init__(self, text: str) -> None:
        self.text, self.n, self.left = text, len(text), BUDGET
        self.places: dict[Any, int] = {}

    def after(self, tree: Iterable[tuple[Any, Any]], start: int) -> int:
        """Returns the positions after a sequence of parts that begins at one of `start`."""
        for op, value in tree:
            if not start:
                return 0
            self.left -= 1
            if self.left < 0:
                raise TooCostly(f"more than {BUDGET:,} steps")
            start = self._part(str(op), value, start)
        return start

    def _part(self, op: str, value: Any, start: int) -> int:
        match op:
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                return (start & self._where(op, value)) << 1
            case "BRANCH":
                found = 0
                for branch in value[1]:
                    found |= self.after(branch, start)
                return found
            case "SUBPATTERN" if not value[1] and not value[2]:
                return self.after(value[3], start)
            case "MAX_REPEAT" | "MIN_REPEAT":
                low, high, body = value
                return self._repeat(low, high, body, start)
            case "AT":
                return start & self._at(str(value))
            case "ASSERT" | "ASSERT_NOT":
                direction, body = value
                held = self._holding(body, direction, start)
                return held if op == "ASSERT" else start & ~held
        raise TooCostly(f"{op.lower().replace('_', ' ')} in it")

    def _repeat(self, low: int, high: int, body: Any, start: int) -> int:
        for _ in range(low):
            before, start = start, self.after(body, start)
            if start in (0, before):
                break
        found, new, times = start, start, low
        while new and times < high:
            new = self.after(body, new) & ~found
            found |= new
            times += 1
        return found

    def _holding(self, body: Any, direction: int, start: int) -> int:
        """The positions of `start` before which (or after which, for 1) the body matches."""
        width = body.getwidth()[0]
        held = 0
        for position in _bits(start):
            begin = position if direction > 0 else position - width
            if begin >= 0:
                found = self.after(body, 1 << begin)
                if found if direction > 0 else found >> position & 1:
                    held |= 1 << position
        return held

    def _where(self, op: str, value: Any) -> int:
        """The positions before a character that fits, found once for every part."""
        key = (op, id(value) if op == "IN" else value)
        if key not in self.places:
            fitting = (i for i, c in enumerate(self.text) if _fits(op, value, c))
            self.places[key] = sum(1 << i for i in fitting)
            self.left -= self.n // 10
        return self.places[key]

    def _at(self, where: str) -> int:
        n, text = self.n, self.text
        match where:
            case "AT_BEGINNING" | "AT_BEGINNING_STRING":
                return 1
            case "AT_END":
                return (1 << n) | (1 << n - 1 if text.endswith("\n") else 0)
            case "AT_END_STRING":
                return 1 << n
            case "AT_BOUNDARY" | "AT_NON_BOUNDARY":
                words = [False, *(c.isalnum() or c == "_" for c in text), False]
                inner = where == "AT_BOUNDARY"
                return sum(1 << i for i in range(n + 1) if (words[i] != words[i + 1]) == inner)
        raise TooCostly(f"{where} in it")


def _bits(found: int) -> Iterable[int]:
    while found:
        lowest = found & -found
        yield lowest.bit_length() - 1
        found ^= lowest


def _fits(op: str, value: Any, c: str) -> bool:
    match op:
        case "LITERAL":
            return bool(ord(c) == value)
        case "NOT_LITERAL":
            return bool(ord(c) != value)
        case "ANY":
            return c != "\n"
    negated, fits = False, False
    for kind, item in value:
        match str(kind):
            case "NEGATE":
                negated = True
            case "CATEGORY":
                fits = fits or _in_category(str(item), c)
            case "RANGE":
                fits = fits or item[0] <= ord(c) <= item[1]
            case "LITERAL":
                fits = fits or ord(c) == item
            case other:
                raise TooCostly(f"{other} in it")
    return fits != negated


def _in_category(name: str, c: str) -> bool:
    category = name.removeprefix("CATEGORY_")
    kind = category.removeprefix("NOT_")
    if kind not in ("DIGIT", "SPACE", "WORD"):
        raise TooCostly(f"{name} in it")
    fits = {"DIGIT": c.isdecimal(), "SPACE": c.isspace(), "WORD": c.isalnum() or c == "_"}[kind]
    return fits != (category != kind)
