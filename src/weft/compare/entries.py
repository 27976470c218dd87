"""Which methods are compared, with which configurations and learning rates."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from .. import methods
from ..errors import ConfigError

DEFAULT = ("full", "head", "bitfit", "lora", "vera", "dora", "dvora")

# Peak rates tried for a method on the embedded task; the grid grows by itself where the best lies
# at its edge.
LRS = {
    "Full": (1e-3, 3e-3, 1e-2),
    "Head": (1e-2, 3e-2, 1e-1),
    "BitFit": (3e-3, 1e-2, 3e-2),
    "TopLayers": (1e-3, 3e-3, 1e-2),
    "LoRA": (3e-3, 1e-2, 3e-2),
    "VeRA": (1e-2, 3e-2, 1e-1),
    "DoRA": (3e-3, 1e-2, 3e-2),
    "DVoRA": (1e-2, 3e-2, 1e-1),
    "Bottleneck": (3e-3, 1e-2, 3e-2),
    "LoRAFA": (3e-3, 1e-2, 3e-2),
    "AdaLoRA": (1e-2, 3e-2, 1e-1),
    "DyLoRA": (3e-3, 1e-2, 3e-2),
    "Prefix": (3e-2, 1e-1, 3e-1),
    "PreEmbed": (3e-3, 1e-2, 3e-2),
    "PreLayer": (1e-3, 3e-3, 1e-2),
}
OTHER_LRS = (1e-3, 3e-3, 1e-2)  # of a method that the table above does not know yet
_SHOWN = ("r", "alpha", "d_init", "init", "n", "l_p", "l_i")  # fields in the list of methods
GROW = 3  # times that a grid may grow


@dataclass(frozen=True)
class Entry:
    """One row of the table: its name, its configuration (without head and seed), and the rates to
    try.

    `steps` are those of its runs where they are its own; `refused` says why nothing of it can be
    trained.
    """

    label: str
    config: Any
    lrs: tuple[float, ...]
    grows: bool = True
    steps: int | None = None
    refused: str | None = None
    given: frozenset[str] = frozenset()  # the fields that were asked for by name

    @property
    def method(self) -> str:
        return type(self.config).__name__

    def with_head(self, head: Sequence[str], seed: int) -> Any:
        """The configuration of a run: the new head is trained in full beside the method, with the
        run's seed.
        """
        fields = {"modules_to_save": tuple(head)}
        if hasattr(self.config, "seed"):
            return replace(self.config, **fields, seed=seed)
        return replace(self.config, **fields)


def parse_methods(text: str) -> list[Entry]:
    """`lora,vera:r=64,dora:r=4:alpha=8` as entries. Raises ConfigError: unknown names and fields,
    rows named alike.
    """
    entries: list[Entry] = []
    for part in (p.strip() for p in split(text, ",")):
        if not part:
            raise ConfigError(
                f"--methods {text!r}: a name is missing between two commas. Methods: {_names()}."
            )
        name, *settings = split(part, ":")
        fields = dict(_setting(setting, part) for setting in settings)
        for own in ("modules_to_save", "seed"):
            if own in fields:
                raise ConfigError(f"--methods {part!r}: {own!r} is set by weft compare itself.")
        cls = methods.by_name(name)
        config = methods.from_json({"method": cls.__name__, **fields})
        label = " ".join([cls.__name__, *(f"{key}={value}" for key, value in fields.items())])
        if any(entry.label == label for entry in entries):
            raise ConfigError(f"--methods {text!r}: {label!r} is there twice.")
        entries.append(
            Entry(label, config, LRS.get(cls.__name__, OTHER_LRS), given=frozenset(fields))
        )
    return entries


def split(text: str, mark: str) -> list[str]:
    """`text` cut at every mark outside brackets, so that a list of targets stays whole."""
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
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _names() -> str:
    return ", ".join(name.lower() for name in methods.METHODS)


def with_lrs(entries: Sequence[Entry], overrides: Sequence[str]) -> list[Entry]:
    """Apply `--lr METHOD=RATE,RATE` options: exactly these rates, without growing. Raises
    ConfigError.
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
        given[known[name.lower()]] = _rates(text, rates)
    out = []
    for entry in entries:
        lrs = given.get(entry.label, given.get(entry.method))
        out.append(entry if lrs is None else replace(entry, lrs=lrs, grows=False))
    return out


def _rates(text: str, rates: str) -> tuple[float, ...]:
    try:
        values = sorted({float(rate) for rate in rates.split(",")})
    except ValueError:
        values = []
    if not values or not all(math.isfinite(v) and v > 0 for v in values):
        raise ConfigError(f"--lr {text!r}: rates are numbers above 0, for example lora=1e-3,3e-3.")
    return tuple(values)


def fit(entries: Sequence[Entry], narrowest: int) -> tuple[list[Entry], list[str]]:
    """Entries for a model whose narrowest adapted layer has this many inputs, and notes.

    VeRA's default rank of 256 makes no sense on layers narrower than that: its random rows could
    not be independent. A rank that was asked for stays.
    """
    out, notes = [], []
    for entry in entries:
        default = entry.label == entry.method and entry.method in ("VeRA", "DVoRA")
        if default and entry.config.r > narrowest:
            notes.append(
                f"{entry.label}: r={narrowest} (the narrowest adapted layer) in place of "
                f"{entry.config.r}."
            )
            entry = replace(entry, config=replace(entry.config, r=narrowest))
        out.append(entry)
    return out, notes


def rate(value: float) -> str:
    """A learning rate in few characters: 3e-03 as 3e-3."""
    mantissa, _, exponent = f"{value:.2g}".partition("e")
    if not exponent:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def grown(lrs: Sequence[float], best: float) -> float | None:
    """The next rate beyond the edge that `best` lies on, by the grid's 1, 3, 10 rhythm; None inside
    the grid.
    """
    if best == min(lrs):
        return _neighbour(best, -1)
    return _neighbour(best, 1) if best == max(lrs) else None


def _neighbour(value: float, step: int) -> float:
    place = round(2 * math.log10(value)) + step
    exponent, half = divmod(place, 2)
    return float(f"{3 if half else 1}e{exponent}")


def as_table(entries: Mapping[str, Entry]) -> list[str]:
    """One line per method for `--list`."""
    lines = []
    for name, entry in entries.items():
        fields = {k: v for k, v in methods.to_json(entry.config).items() if k in _SHOWN}
        shown = " ".join(f"{k}={v}" for k, v in fields.items() if v is not None)
        rates = ", ".join(rate(lr) for lr in entry.lrs)
        lines.append(f"  {name.lower():<18} learning rates {rates:<18} {shown}".rstrip())
    return lines
