"""Which methods are compared, with which configurations and learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from ... import methods
from ...errors import ConfigError
from ...methods.config import LayerConfig
from ...methods.field_types import literal
from ...model.groups import check_factors

DEFAULT = ("full", "head", "bitfit", "lora", "vera", "dora", "dvora")

_SHOWN_FIELDS = ("r", "alpha", "d_init", "init", "n", "l_p", "l_i")  # fields in the list of methods
RATIO = "lora_plus"  # a setting of a row that is no field of its configuration
GROWTH_LIMIT = 3  # how often a grid may grow


@dataclass(frozen=True)
class Entry:
    """One row of the table: its label, its configuration (without head and seed), and the learning
    rates to try.

    `lora_plus` is the row's ratio of the rates of B and A, or None. `steps` is set if its runs have
    their own number of steps. `refused` is the reason if the row
    cannot be trained.
    """

    label: str
    config: Any
    lrs: tuple[float, ...]
    grows: bool = True
    steps: int | None = None
    refused: str | None = None
    given: frozenset[str] = frozenset()  # the fields that the user set
    lora_plus: float | None = None

    @property
    def method(self) -> str:
        """The name of the method's class."""
        return type(self.config).__name__

    def with_head(self, head: Sequence[str], seed: int) -> Any:
        """Returns the configuration of a run: the head is trained in full, with the run's seed."""
        fields = {"modules_to_save": tuple(head)}
        if hasattr(self.config, "seed"):
            return replace(self.config, **fields, seed=seed)
        return replace(self.config, **fields)


def learning_rates(cls: type[methods.Config]) -> tuple[float, ...]:
    """Returns the peak learning rates to try for a method by default.

    A grid grows by itself if its best rate is at an edge.
    """
    return cls.learning_rates


def parse_methods(text: str) -> list[Entry]:
    """Parses `lora,vera:r=64,dora:r=4:alpha=8,lora:lora_plus=16`.

    Raises ConfigError if a name or a field is not known, or if two rows have the same label.
    """
    entries: list[Entry] = []
    for part in (p.strip() for p in split(text, ",")):
        if not part:
            raise ConfigError(
                f"--methods {text!r}: a name is missing between two commas. "
                f"Methods: {_method_names()}."
            )
        name, *settings = split(part, ":")
        given = [_setting(setting, part) for setting in settings]
        fields = dict(given)
        if len(fields) < len(given):
            raise ConfigError(f"--methods {part!r}: a field is given twice.")
        for taken in ("modules_to_save", "seed"):
            if taken in fields:
                raise ConfigError(f"--methods {part!r}: {taken!r} is set by weft compare.")
        cls = methods.by_name(name)
        label = " ".join([cls.__name__, *(f"{key}={value}" for key, value in fields.items())])
        ratio = fields.pop(RATIO, None)
        config = methods.from_json({"method": cls.__name__, **fields})
        _check_ratio(part, config, ratio)
        if any(entry.label == label for entry in entries):
            raise ConfigError(f"--methods {text!r}: {label!r} appears twice.")
        rates, own = learning_rates(cls), frozenset(fields)
        entries.append(Entry(label, config, rates, given=own, lora_plus=ratio))
    return entries


def _check_ratio(part: str, config: Any, ratio: Any) -> None:
    """Raises ConfigError unless `lora_plus` is a number above 0 and the method trains A and B."""
    if ratio is None:
        return
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not number or not 0 < ratio < math.inf:
        raise ConfigError(f"--methods {part!r}: {RATIO}={ratio!r} must be a number above 0.")
    own = list(config.shapes(8, 8)) if isinstance(config, methods.TensorConfig) else []
    check_factors(config, own, {}, ratio, f"--methods {part!r}: ")


def split(text: str, mark: str) -> list[str]:
    """Splits `text` at every mark outside brackets, so that a list of targets stays whole."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == mark and depth <= 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _setting(text: str, part: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        raise ConfigError(
            f"--methods {part!r}: write fields as name=value, for example lora:r=4:alpha=8."
        )
    return key, literal(value)


def _method_names() -> str:
    return ", ".join(name.lower() for name in methods.METHODS)


def with_learning_rates(entries: Sequence[Entry], overrides: Sequence[str]) -> list[Entry]:
    """Applies `--lr METHOD=RATE,RATE` options: these rates only, in a grid that does not grow.

    Raises ConfigError if a method is not in the comparison or a rate is invalid.
    """
    given: dict[str, tuple[float, ...]] = {}
    known = {name.lower(): name for e in entries for name in (e.method, e.label)}
    for text in overrides:
        name, equals, rates = text.rpartition("=")
        if not equals or name.lower() not in known:
            near = get_close_matches(name.lower(), known, n=2) or sorted(known)
            raise ConfigError(
                f"--lr {text!r}: write METHOD=RATE,RATE with a method of this comparison. "
                f"Nearest: {near}."
            )
        given[known[name.lower()]] = _parse_rates(text, rates)
    out = []
    for entry in entries:
        lrs = given.get(entry.label, given.get(entry.method))
        out.append(entry if lrs is None else replace(entry, lrs=lrs, grows=False))
    return out


def _parse_rates(text: str, rates: str) -> tuple[float, ...]:
    try:
        values = sorted({float(rate) for rate in rates.split(",")})
    except ValueError:
        values = []
    if not values or not all(math.isfinite(v) and v > 0 for v in values):
        raise ConfigError(f"--lr {text!r}: rates are numbers above 0, for example lora=1e-3,3e-3.")
    return tuple(values)


def with_fitting_ranks(entries: Sequence[Entry], narrowest: int) -> tuple[list[Entry], list[str]]:
    """Returns the entries with default ranks that fit the model, and notes about them.

    `narrowest` is the input size of the narrowest adapted layer. VeRA's default of 256 exceeds it
    in small models: the random rows could then not be independent. An explicit rank is kept.
    """
    out, notes = [], []
    for entry in entries:
        rank = getattr(entry.config, "r", None)
        if not entry.given and isinstance(rank, int) and rank > narrowest:
            notes.append(
                f"{entry.label}: r={narrowest} (the width of the narrowest adapted layer) instead of "
                f"{rank}."
            )
            entry = replace(entry, config=replace(entry.config, r=narrowest))
        out.append(entry)
    return out, notes


def without_frozen(entries: Sequence[Entry], frozen: Sequence[str]) -> list[Entry]:
    """Returns the entries with these modules excluded from the layers that they adapt, unless an
    entry has an `exclude` of its own.
    """
    if not frozen:
        return list(entries)
    return [
        replace(entry, config=replace(entry.config, exclude=tuple(frozen)))
        if isinstance(entry.config, LayerConfig) and not entry.config.exclude
        else entry
        for entry in entries
    ]


def format_rate(value: float) -> str:
    """Returns a learning rate in few characters: 3e-3 for 0.003."""
    mantissa, _, exponent = f"{value:.2g}".partition("e")
    if not exponent:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def next_rate(lrs: Sequence[float], best: float) -> float | None:
    """Returns the next rate beyond the edge on which `best` is, in steps of 1, 3, 10.

    Returns None if `best` is inside the grid.
    """
    if best == min(lrs):
        return _neighbour(best, -1)
    return _neighbour(best, 1) if best == max(lrs) else None


def _neighbour(value: float, step: int) -> float:
    position = round(2 * math.log10(value)) + step
    exponent, half = divmod(position, 2)
    return float(f"{3 if half else 1}e{exponent}")


def method_lines(entries: Mapping[str, Entry]) -> list[str]:
    """Returns one line per method for `--list`."""
    lines = []
    for name, entry in entries.items():
        fields = {k: v for k, v in methods.to_json(entry.config).items() if k in _SHOWN_FIELDS}
        shown = " ".join(f"{k}={v}" for k, v in fields.items() if v is not None)
        rates = ", ".join(format_rate(lr) for lr in entry.lrs)
        lines.append(f"  {name.lower():<18} learning rates {rates:<18} {shown}".rstrip())
    return lines
