"""Random damage to bytes, text and trees of JSON values, all of it decided by the generator given."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any


class Raw(str):
    """Text that goes into JSON or YAML as it is."""

    __slots__ = ()


class Twice(dict):
    """An object whose first key is written twice."""


WORDS = [
    "x",
    "",
    "mid",
    "3",
    "false",
    "True",
    "nan",
    "(a+)+b",
    "(x|x)*y|.*",
    "((l|a|y|e|r|m|i|d)*)*",
    "../../x",
    "/dev/zero",
    "\x1b[31m",
    "\u202e",
    "é" * 40,
    "a" * 5000,
    "layer|mid",
    "(",
    "a\0b",
]
VALUES = [
    *WORDS,
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    4,
    3.5,
    -0.0,
    1e308,
    1e-320,
    2**31,
    2**63,
    10**18,
    [],
    {},
    [[]],
    ["mid"],
    {"mid": 2},
    {"(m+)+id": 4},
]
RAWS = [
    Raw("9" * 400),
    Raw("9" * 5000),
    Raw("1e999"),
    Raw("NaN"),
    Raw("-Infinity"),
    Raw('"\\ud800"'),
    Raw("[" * 200 + "]" * 200),
    Raw("[" * 20_000 + "]" * 20_000),
    Raw('{"a": 1, "a": 2}'),
    Raw("010"),
    Raw("1_0"),
]


def flipped(rng: Random, data: bytes) -> bytes:
    """Bytes with one to four faults: flipped, removed, repeated, inserted or zeroed."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(out) + 1)
        n = rng.choice([1, 1, 2, 8, 64])
        match rng.randrange(7):
            case 0 | 1 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                del out[at : at + n]
            case 3:
                out[at:at] = out[at : at + n]
            case 4:
                out[at:at] = rng.randbytes(n)
            case 5:
                out[at : at + n] = bytes(len(out[at : at + n]))
            case 6:
                del out[at:]
    return bytes(out)


def mutated(rng: Random, value: Any) -> Any:
    """A copy of a tree of JSON values with one to three changes."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = _changed(rng, value)
    return value


def _changed(rng: Random, root: Any) -> Any:
    places = list(_places(root))
    if not places:
        return rng.choice(VALUES)
    parent, key = rng.choice(places)
    match rng.randrange(8):
        case 0 | 1 | 2:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        case 3:
            parent[key] = rng.choice(RAWS)
        case 4:
            _, other = rng.choice(places)
            del parent[key]
            if isinstance(parent, dict):
                parent[str(other) + rng.choice(["", "x"])] = rng.choice(VALUES)
        case 5:
            del parent[key]
        case 6:
            other_parent, other_key = rng.choice(places)
            if isinstance(parent, dict) or other_parent is not parent:
                parent[key] = copy.deepcopy(other_parent[other_key])
        case 7:
            parent[key] = _near(rng, parent[key])
    return root


def _near(rng: Random, held: Any) -> Any:
    """A value of the same kind."""
    match held:
        case bool():
            return not held
        case int() | float():
            return held + rng.choice([-1, 1, 0.5, 10**9])
        case str():
            return flipped(rng, held.encode()).decode("utf-8", "replace")
        case dict() if held:
            return Twice(held)
        case list() if held:
            return [*held, copy.deepcopy(rng.choice(held))]
    return held


def _places(value: Any) -> Any:
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return
    for key, held in items:
        yield value, key
        yield from _places(held)


def dumps(value: Any) -> str:
    """JSON in which `Raw` stands as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        parts = [f"{json.dumps(str(k))}: {dumps(v)}" for k, v in value.items()]
        if isinstance(value, Twice):
            parts.append(parts[0])
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)
