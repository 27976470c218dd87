"""The plan of an adapter: its trained tensors, layer by layer, and the frozen ones with reasons."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..untrusted.printable import WIDTH
from .base_layers.held import HeldLayer
from .layer import AdapterLayer
from .left_out import Share, count, shares, text
from .plan_entries import Frozen, Row

HELD = (
    "kind weight: their modules read them and call no layer, so W' [out, in] is built in every "
    "forward, which is slower than an adapted layer and takes a copy of the weight"
)


@dataclass(frozen=True)
class Plan:
    """Printed as a table of at most 80 columns in which repeated layers share a line."""

    method: str
    rows: list[Row]
    frozen: list[Frozen]
    base_parameters: int
    ranks: dict[str, int] | None = None  # by layer, if the method moves rank between layers
    left_out: Sequence[Share] = ()  # the weights of the frozen layers, by kind

    @property
    def trainable(self) -> int:
        """The number of trained numbers."""
        return sum(row.trainable for row in self.rows)

    @property
    def nbytes(self) -> int:
        """The bytes of the trained tensors in memory."""
        return sum(row.nbytes for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        return {
            "method": self.method,
            "trainable": self.trainable,
            "nbytes": self.nbytes,
            "base_parameters": self.base_parameters,
            "rows": [vars(r) for r in self.rows],
            "frozen": [vars(f) for f in self.frozen],
            "left_out": [vars(share) for share in self.left_out],
            **({} if self.ranks is None else {"ranks": self.ranks}),
        }

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.base_parameters, 1)
        head = (
            f"{self.method}: {self.trainable:,} trained numbers ({share:.4g} % of "
            f"{self.base_parameters:,}), "
            f"{size_text(self.nbytes)}"
        )
        lines = [head, *rows_as_text(self.rows)]
        if any(row.kind == HeldLayer.kind for row in self.rows):
            lines += textwrap.wrap(HELD, WIDTH)
        if self.ranks is not None:
            lines += ranks_as_text(self.ranks)
        if self.frozen:
            lines += self._frozen_head()
        for pattern, cold in _folded(self.frozen):
            lines += _wrapped(
                f"{pattern} ({cold[0].kind} {_shape_text(cold[0].shape)}, x{len(cold)})",
                cold[0].reason,
            )
        return "\n".join(lines)

    def _frozen_head(self) -> list[str]:
        numbers, total = sum(share.numbers for share in self.left_out), self.base_parameters
        kinds = text(self.left_out, total) if total else ""
        if not kinds:
            return ["stays frozen:"]
        head = f"stays frozen, {100 * numbers / total:.3g} % of the weights ({kinds}):"
        return textwrap.wrap(head, WIDTH, subsequent_indent="  ")


def rows_as_text(rows: list[Row]) -> list[str]:
    """Returns a table of at most 80 columns. Layers that differ only in the numbers of their names
    share a line.
    """
    table: list[tuple[str, ...]] = [("layer", "kind", "shape", "x", "trained", "bytes")]
    for pattern, group in _folded(rows):
        first = group[0]
        trained, nbytes = sum(r.trainable for r in group), sum(r.nbytes for r in group)
        table.append(
            (
                pattern,
                first.kind,
                _shape_text(first.shape),
                str(len(group)),
                f"{trained:,}",
                size_text(nbytes),
            )
        )
    return _columns(table)


def ranks_as_text(ranks: Mapping[str, int]) -> list[str]:
    """Returns the current ranks. Layers of equal names and ranks share a line."""
    rows = [Row(name, str(r), (r,), 0, 0) for name, r in ranks.items()]
    groups = [(pattern, group[0].kind) for pattern, group in _folded(rows)]
    return [
        f"ranks in force, {sum(ranks.values())} in all:",
        *(line for name, r in groups for line in _wrapped(name, r)),
    ]


def plan_of(
    method: str,
    root: nn.Module,
    layers: Mapping[str, AdapterLayer],
    tensors: Mapping[str, nn.Parameter],
    rows_of: Mapping[str, nn.Parameter],
    frozen: Sequence[Frozen],
    ranks: dict[str, int] | None,
) -> Plan:
    """Returns the plan of an adapter: its layers, its other trained tensors, and the rest.

    rows_of: rows of new tokens [n, width], by module. ranks: by layer, or None if the method does
    not move rank between layers.
    """
    rows = [
        Row(
            name,
            layer.base.kind,
            layer.full_shape,
            sum(p.numel() for p in layer.trainable().values()),
            sum(p.numel() * p.element_size() for p in layer.trainable().values()),
        )
        for name, layer in layers.items()
    ]
    rows += [
        Row(name, "tensor", tuple(p.shape), p.numel(), p.numel() * p.element_size())
        for name, p in tensors.items()
    ]
    rows += [
        Row(name, "tokens", tuple(p.shape), p.numel(), p.numel() * p.element_size())
        for name, p in rows_of.items()
    ]
    return Plan(method, rows, list(frozen), count(root), ranks, shares(root, frozen))


def _folded(rows: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Rows that differ only in the numbers of their names, with those numbers as a range:
    layers.{0..11}.q_proj.
    """
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        key = (re.sub(r"\d+", "#", row.name), row.kind, row.shape, getattr(row, "reason", None))
        groups.setdefault(key, []).append(row)
    for (pattern, *_), group in groups.items():
        yield _ranges(pattern, [re.findall(r"\d+", row.name) for row in group]), group


def _ranges(pattern: str, numbers: list[list[str]]) -> str:
    for column in zip(*numbers, strict=True):
        distinct = sorted({int(n) for n in column})
        run = distinct == list(range(distinct[0], distinct[-1] + 1))
        text = (
            str(distinct[0])
            if len(distinct) == 1
            else "{"
            + (f"{distinct[0]}..{distinct[-1]}" if run else ",".join(map(str, distinct)))
            + "}"
        )
        pattern = pattern.replace("#", text, 1)
    return pattern


def _columns(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    room = WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)
    name = max(12, min(widths[0], room))
    lines = []
    for row in table:
        first, *more = _broken(row[0], name)
        rest = [
            row[1].ljust(widths[1]),
            *(c.rjust(w) for c, w in zip(row[2:], widths[2:], strict=True)),
        ]
        lines.append("  ".join([first.ljust(name), *rest]).rstrip())
        lines += ["  " + part for part in more]
    return lines


def _broken(name: str, width: int) -> list[str]:
    """A name in pieces of at most `width`, cut after a dot if possible (not those of a range)."""
    pieces = []
    while len(name) > width:
        cut = max((m.end() for m in re.finditer(r"\.(?![.\d]*})", name[:width])), default=width)
        pieces.append(name[:cut])
        name = name[cut:]
        width = width - 2 if len(pieces) == 1 else width
    return [*pieces, name]


def _wrapped(name: str, text: str) -> list[str]:
    line = f"  {name}: {text}"
    if len(line) <= WIDTH:
        return [line]
    return [
        *textwrap.wrap(
            f"{name}:", WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
        ),
        *textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    "),
    ]


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def size_text(nbytes: float) -> str:
    """Returns a number of bytes in four digits and a unit."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"
