"""`targets=`: the layers that a method adapts, validated and converted to one immutable form.

A *pattern* is one of
    "all-linear"   every linear map but the output head, embeddings, routers and convolutions
    "conv"         every convolution outside the output head, and layers of that name
    "attention"    the linear maps of the attention modules        "mlp"   all others inside the model's blocks
    "experts"      the weights of the routed experts, fused into one parameter or in layers of their own
    "attention-output"   the last map of every attention, before the residual sum    "mlp-output"   that of every MLP
    "block-output"       in post-norm models the layer norm after the MLP, else the same as "mlp-output"
    "q_proj"       letters, digits, '_' and '.': the ending of a module's name, cut at a dot
    other text     a regular expression that must match a module's whole name
and `targets` is a pattern, a list of patterns, or a dict of patterns to the fields they override:
{"q_proj": {"r": 32}}.

`exclude` takes layers away again: a pattern, or a list of patterns; an ending may also name a
module, which stands for all layers in it. `within` keeps only the layers inside some modules: the
ending of a name, or a list of them. `layers` keeps only those of the blocks with these numbers: one
number, or a list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from ..untrusted import patterns as expressions
from ..untrusted.json_text import shortened
from .field_types import WrongType, conform, short

ROLES = (
    "attention-output",
    "mlp-output",
    "block-output",
)  # one module per block; model/structure/blocks.py finds them
KEYWORDS = ("all-linear", "attention", "mlp", "conv", "experts", *ROLES)
_ENDING = re.compile(r"[A-Za-z0-9_.]+")


@dataclass(frozen=True)
class Overrides:
    """Patterns with the fields they override, in order. If two patterns match a layer, the later
    one wins, field by field.
    """

    entries: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]


def is_ending(pattern: str) -> bool:
    """Returns True if the pattern is the ending of a name: neither a keyword nor a regular
    expression.
    """
    return pattern not in KEYWORDS and _ENDING.fullmatch(pattern) is not None


def normalise(targets: Any) -> str | tuple[str, ...] | Overrides:
    """Returns `targets` in an immutable form. Raises ConfigError if it has another type, is empty,
    or has an invalid regular expression.
    """
    if isinstance(targets, Overrides):
        return targets
    if isinstance(targets, str):
        return _checked(targets)
    if isinstance(targets, Mapping) and targets:
        entries = []
        for pattern, fields in targets.items():
            if not isinstance(fields, Mapping) or not all(
                isinstance(field, str) for field in fields
            ):
                raise ConfigError(
                    f"targets={{{pattern!r}: {fields!r}}}: write the fields to override as a dict, "
                    "for "
                    'example {"q_proj": {"r": 32}}; {} overrides nothing.'
                )
            entries.append(
                (
                    _checked(pattern),
                    tuple((field, _json_value(value)) for field, value in fields.items()),
                )
            )
        return Overrides(tuple(entries))
    if isinstance(targets, Sequence | set | frozenset) and targets:
        ordered = targets if isinstance(targets, Sequence) else sorted(targets, key=str)
        return tuple(_checked(pattern) for pattern in ordered)
    raise ConfigError(
        f"targets={targets!r}: write one of {list(KEYWORDS)}, a list of name endings such as "
        '["q_proj", "v_proj"], a regular expression, or a dict of these to overridden fields.'
    )


def patterns(targets: str | tuple[str, ...] | Overrides) -> list[tuple[str, dict[str, Any]]]:
    """Returns every pattern with the fields that it overrides."""
    if isinstance(targets, Overrides):
        return [(pattern, dict(fields)) for pattern, fields in targets.entries]
    return [(pattern, {}) for pattern in ((targets,) if isinstance(targets, str) else targets)]


def normalise_names(method: str, field: str, value: Any) -> tuple[str, ...]:
    """Returns `exclude` or `within` as a tuple of patterns, each once; `method` is for messages.

    Raises ConfigError if it has another type, or an invalid regular expression.
    """
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, Sequence | set | frozenset):
        raise ConfigError(
            f'{method}({field}={short(value)}): write a list of name endings, for example ["o_proj"].'
        )
    ordered = given if isinstance(given, Sequence) else sorted(given, key=str)
    for name in ordered:
        _checked(name, field)
        if field == "within" and not _ENDING.fullmatch(name):
            raise ConfigError(
                f"{method}({field}={short(value)}): {name!r} is not the ending of a module's name, which "
                "has letters, digits, '_' and '.'."
            )
    return tuple(dict.fromkeys(ordered))


def normalise_blocks(method: str, value: Any) -> tuple[int, ...]:
    """Returns `layers` as a sorted tuple of block numbers, each once.

    Raises ConfigError if one of them is not a whole number from 0 on.
    """
    given = list(value) if isinstance(value, set | frozenset | range) else value
    try:
        found = conform(int | list[int], given)
    except WrongType:
        found = -1
    numbers = [found] if isinstance(found, int) else found
    if any(n < 0 for n in numbers):
        raise ConfigError(
            f"{method}(layers={short(value)}): write the numbers of blocks, counted from 0, for "
            "example [0, 1]. Names of layers belong in targets."
        )
    return tuple(sorted(set(numbers)))


def to_plain(targets: Any) -> Any:
    """Returns JSON values from which `normalise` restores the same targets."""
    if isinstance(targets, Overrides):
        return {pattern: dict(fields) for pattern, fields in targets.entries}
    return targets if isinstance(targets, str) else list(targets)


def _json_value(value: Any) -> Any:
    """Returns a field's value as a JSON value."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _checked(pattern: Any, field: str = "targets") -> str:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(
            f"{field}: {pattern!r} is no pattern; write a name ending, a regular expression, or "
            "one of "
            f"{list(KEYWORDS)}."
        )
    try:
        expressions.check(pattern)
    except ValueError as error:
        raise ConfigError(
            f"{field}: {shortened(pattern)} is no regular expression: {error}."
        ) from None
    return pattern
