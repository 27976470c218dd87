"""The types of configuration fields: one check for methods, the sections of `weft train`, and the
fields of peft's files.

A field's annotation is the rule. `None` is a value only if the annotation has it; a boolean is no
number, a number no boolean, and the word "false" is text and no boolean (it would count as true).
What is typed on a command line is turned into a value first, by `literal`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from functools import cache
from numbers import Integral, Real
from typing import Any

from ..errors import ConfigError

LARGEST = 2**63 - 1  # of a whole number, in absolute value
_WORDS = {"true": True, "false": False, "null": None}
# A list of words without quotes, as a shell leaves them: [q_proj, v_proj].
_BARE_LIST = re.compile(r"\[\s*[A-Za-z_][\w.-]+(\s*,\s*[A-Za-z_][\w.-]+)*\s*,?\s*\]")
_SCALARS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    Mapping: "a mapping",
}


class WrongType(Exception):
    """A value that its annotation does not allow. The text says what is allowed."""


class _WrongItem(WrongType):
    """The value is a list or a mapping, as it may be, and something in it is wrong."""


def conform(hint: Any, value: Any) -> Any:
    """Returns the value as the annotation `hint` has it: lists become tuples, and numpy's numbers
    Python's. A whole number below 2**63 stays one where a number is allowed.

    An annotation that is none of bool, int, float, str, tuple[X, ...], list[X], Mapping, Literal,
    a dataclass, or a union of them allows everything. Raises WrongType.
    """
    origin = typing.get_origin(hint)
    if hint is None or hint is type(None):
        if value is not None:
            raise WrongType("None")
    elif origin in (typing.Union, types.UnionType):
        return _union(typing.get_args(hint), value)
    elif origin is typing.Literal:
        if not any(type(value) is type(one) and value == one for one in typing.get_args(hint)):
            raise WrongType("one of " + ", ".join(map(repr, typing.get_args(hint))))
    elif origin is list or (origin is tuple and typing.get_args(hint)[-1] is Ellipsis):
        if not isinstance(value, list | tuple):
            raise WrongType("a list")
        items = [_inner(hint, 0, item, "a list whose items are") for item in value]
        return tuple(items) if origin is tuple else items
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(hint, value)
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, hint):
            raise WrongType(f"a {hint.__name__}")
    elif hint in _SCALARS:
        return _scalar(hint, value)
    return value


def check_types(config: Any) -> None:
    """Checks the fields of a dataclass against their annotations, and stores what `conform`
    returns.

    Raises ConfigError, which names class, field and value.
    """
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in checked(type(config), given).items():
        if value is not given[name]:
            object.__setattr__(config, name, value)


def checked(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `conform` does of values for fields of `cls`. Other names are not looked at.

    Raises ConfigError, which names class, field and value.
    """
    hints = hints_of(cls)
    return {
        name: _checked_field(cls, name, hints.get(name, Any), value)
        for name, value in values.items()
    }


@cache
def hints_of(cls: type[Any]) -> dict[str, Any]:
    """Returns the annotation of every field of a dataclass.

    The fields of a class whose annotations name what only a function around it knows count as Any.
    """
    known: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        with contextlib.suppress(NameError):
            known |= typing.get_type_hints(base)
    return {field.name: known.get(field.name, Any) for field in dataclasses.fields(cls)}


def literal(text: str) -> Any:
    """Returns the value of a command line's text: a Python literal; true, false or null in any
    case; a list of words without quotes, `[q_proj, v_proj]`; else the text itself.
    """
    if text.casefold() in _WORDS:
        return _WORDS[text.casefold()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if _BARE_LIST.fullmatch(text):
            return [word.strip() for word in text.strip("[], ").split(",")]
        return text


def short(value: Any) -> str:
    """Returns a value for a message, in at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python prints
        text = f"a {type(value).__name__} of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _checked_field(cls: Any, name: str, hint: Any, value: Any) -> Any:
    try:
        return conform(hint, value)
    except WrongType as error:
        raise ConfigError(
            f"{cls.__name__}({name}={short(value)}): {name} must be {error}."
        ) from None


def _mapping(hint: Any, value: Any) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise WrongType("a mapping")
    keys = (_inner(hint, 0, key, "a mapping whose keys are") for key in value)
    values = (_inner(hint, 1, item, "a mapping whose values are") for item in value.values())
    return dict(zip(keys, values, strict=True))


def _inner(hint: Any, place: int, value: Any, what: str) -> Any:
    try:
        return conform(typing.get_args(hint)[place], value)
    except WrongType as error:
        raise _WrongItem(f"{what} {error}, and {short(value)} is not") from None


def _union(hints: tuple[Any, ...], value: Any) -> Any:
    errors = []
    for hint in hints:
        try:
            return conform(hint, value)
        except WrongType as error:  # noqa: PERF203 - two or three hints
            errors.append(error)
    # What is wrong within the value ends the sentence, since it is a sentence of its own.
    kinds = " or ".join(str(error) for error in errors if not isinstance(error, _WrongItem))
    items = [str(error) for error in errors if isinstance(error, _WrongItem)]
    raise WrongType(", or ".join([kinds, *items] if kinds else items))


def _scalar(hint: Any, value: Any) -> Any:
    kind: Any = type(value)
    if hint in (int, float) and issubclass(kind, Integral) and kind is not bool:
        if abs(int(value)) <= LARGEST:
            return value if kind is int else int(value)
        if hint is int:
            raise WrongType("a whole number below 2**63")
    if hint is float and issubclass(kind, Real) and kind is not bool:
        try:
            return value if kind is float else float(value)
        except OverflowError:
            raise WrongType("a number that float64 can hold") from None
    if hint is str and isinstance(value, str):  # numpy's text, or an enum's
        return value if kind is str else str.__str__(value)
    if hint in (int, float) or not isinstance(value, hint):
        raise WrongType(_SCALARS[hint])
    return value
