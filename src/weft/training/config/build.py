"""A mapping of plain values to a dataclass, with checks of names; the dataclass checks the values."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

from ...errors import ConfigError
from ...methods.field_types import short
from .checks import nearest


def build(cls: type[Any], data: Any, where: str) -> Any:
    """Returns an instance of the dataclass `cls`. `where` is its dotted key with a dot at the end,
    or "".

    Raises ConfigError for an unknown or missing key.
    """
    name = where.rstrip(".") or "the configuration"
    if data is None and where:
        data = {}
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{name}={short(data)}: write a mapping with keys of "
            f"{[f.name for f in dataclasses.fields(cls)]}."
        )
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}{key} is not known. {nearest(str(key), known, where)}")
    for key, f in known.items():
        if key not in data and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{where}{key} is missing.")
    hints = typing.get_type_hints(cls)
    return cls(
        **{
            key: build(hints[key], value, f"{where}{key}.")
            if dataclasses.is_dataclass(hints[key])
            else value
            for key, value in data.items()
        }
    )
