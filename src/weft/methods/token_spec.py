"""`new_tokens=`: the tokens whose rows of the embeddings train, checked as far as possible without
a model.

    new_tokens=[50257, 50258]               of the input embedding, and of the output head
    new_tokens={"embed_tokens": [50257]}    of the modules with these name endings
A tensor that several modules read has one set of rows, whichever of its modules is named.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ConfigError

Ids = tuple[int, ...]
Spec = Ids | tuple[tuple[str, Ids], ...]


def normalise(method: str, given: Any) -> Spec:
    """Returns the ids in ascending order, or one pair (name ending, ids) per entry of a mapping.

    `method` is the configuration's name, for messages. Raises ConfigError for anything else, for
    text, for an id below 0 or beyond 2**31, and for one that is given twice.
    """
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, list | tuple) and given and all(_is_pair(entry) for entry in given):
        pairs = [tuple(entry) for entry in given]
    else:
        return ids_of(method, given)
    for name, _ in pairs:
        if not isinstance(name, str) or not name:
            raise _refusal(method, given, f"{name!r} is no ending of a module's name")
    return tuple((name, ids_of(method, ids)) for name, ids in pairs)


def by_module(spec: Spec) -> dict[str | None, Ids]:
    """Returns the ids by name ending; None stands for the input embedding and the head."""
    if all(isinstance(entry, int) for entry in spec):
        return {None: spec} if spec else {}  # type: ignore[dict-item]
    return dict(spec)  # type: ignore[arg-type]


def to_plain(spec: Spec) -> Any:
    """Returns the specification as JSON values."""
    found = by_module(spec)
    if None in found or not found:
        return list(found.get(None, ()))
    return {name: list(ids) for name, ids in found.items()}


def ids_of(method: str, given: Any) -> Ids:
    """Returns ids in ascending order. Raises ConfigError as `normalise`."""
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise _refusal(method, given, "these are no ids")
    found = []
    for entry in given:
        if isinstance(entry, str):
            raise _refusal(
                method, given, f"{entry!r} is text: give tokenizer.convert_tokens_to_ids([...])"
            )
        try:
            value = operator.index(entry)
        except TypeError:
            raise _refusal(method, given, f"{entry!r} is no id") from None
        if isinstance(entry, bool) or not 0 <= value < 2**31:
            raise _refusal(method, given, f"{entry!r} is no id")
        found.append(value)
    if len(set(found)) != len(found):
        twice = next(value for value in found if found.count(value) > 1)
        raise _refusal(method, given, f"{twice} is given twice")
    return tuple(sorted(found))


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)


def _refusal(method: str, given: Any, why: str) -> ConfigError:
    shown = repr(given) if len(repr(given)) < 120 else f"{repr(given)[:117]}..."
    return ConfigError(
        f"{method}(new_tokens={shown}): {why}. Write a list of token ids, for example "
        '[50257, 50258], or ids by module, for example {"embed_tokens": [50257]}.'
    )
