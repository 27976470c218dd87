"""A mapping of plain values to a dataclass, with checks of names and types."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

from ...errors import ConfigError
from .checks import nearest


def build(cls: type[Any], data: Any, where: str) -> Any:
    """Returns an instance of the dataclass `cls`. `where` is its dotted key with a dot at the end,
    or "".

    Raises ConfigError for an unknown or missing key and for a value of the wrong type.
    """
    name = where.rstrip(".") or "the configuration"
    if data is None and where:
        data = {}
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{name}={data!r}: write a mapping with keys of "
            f"{[f.name for f in dataclasses.fields(cls)]}."
        )
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}{key} is not known. {nearest(str(key), known, where)}")
    values = {}
    for key, f in known.items():
        if key in data:
            values[key] = _value(hints[key], data[key], where + key)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{where}{key} is missing.")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type[Any], hint), value, where + ".")
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _value(next(t for t in typing.get_args(hint) if t is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}={value!r}: write a list.")
        return tuple(_value(typing.get_args(hint)[0], item, where) for item in value)
    if origin is not None:  # a mapping
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r}: write a mapping.")
        return {
            str(k): _value(typing.get_args(hint)[1], v, f"{where}.{k}") for k, v in value.items()
        }
    return _scalar(hint, value, where)


def _scalar(hint: type[Any], value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint:
        return value
    kind = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]
    raise ConfigError(f"{where}={value!r}: write {kind}.")
