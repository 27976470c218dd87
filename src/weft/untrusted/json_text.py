"""JSON that someone else may have written. What Python's reader would take in silence, or what
would fail only later, is refused: repeated keys, NaN and infinity, numbers that no field of ours
can hold, deep nesting, and text that cannot be written again.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

DEEPEST = 64  # objects and lists within each other
_DIGITS = 20  # 2**64 has so many
_NO_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[^][{}"]+', re.DOTALL)
_SURROGATE = re.compile(r"\\[uU][dD][89a-fA-F]")


def loads(text: str | bytes) -> Any:
    """Returns the value of a JSON text. Raises ValueError that says what is wrong with it."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    _check_depth(text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
    except RecursionError:  # the caller's own stack is nearly full
        raise ValueError("it is nested too deeply") from None
    if _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def check_keys(text: bytes) -> None:
    """Raises ValueError if an object of a JSON text that another reader accepts repeats a key. The
    values are not kept.
    """
    json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: bool(_object(pairs)))


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    depth = 0
    for bracket in _NO_BRACKETS.sub("", text):
        depth += 1 if bracket in "[{" else -1
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shortened(twice)} is given twice")
    return found


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number has {len(text.lstrip('-'))} digits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shortened(text)} is too large")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a text in it has half of a surrogate pair (\\ud800 to \\udfff)") from None


def shortened(value: Any, most: int = 60) -> str:
    """Returns repr of a value of a file for a message, cut to `most` characters."""
    text = repr(value if not isinstance(value, str) else value[: most + 1])
    return text if len(text) <= most + 2 else f"{text[:most]}..."


__all__ = ["DEEPEST", "check_keys", "loads", "shortened"]
