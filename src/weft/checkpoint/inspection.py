"""`weft.inspect`: what an adapter directory is, checked without a model."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import methods
from ..model.plan import WIDTH, ranks_as_text, rows_as_text, size_text
from ..model.plan_entries import Row
from . import files
from .content import Stored, StoredSite, refuse
from .load import read


@dataclass(frozen=True)
class Inspection:
    """`rows` as in a plan; `readable_by_peft` says whether `PeftModel.from_pretrained` reads the
    directory.
    """

    path: str
    method: str
    writer: str
    config: dict[str, Any]
    base: dict[str, Any]
    rows: list[Row]
    numbers: int
    nbytes: int
    readable_by_peft: bool
    notes: list[str] = field(default_factory=list)
    ranks: dict[str, int] | None = None  # in force, where the method moves rank between layers

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [{**vars(row), "shape": list(row.shape)} for row in self.rows]
        return {"schema": 1, **vars(self), "rows": rows}

    def __str__(self) -> str:
        """At most 80 columns."""
        fields = ", ".join(
            f"{k}={v}" for k, v in self.config.items() if k != "method" and v not in ([], None)
        )
        kind = self.base.get("model_type") or self.base.get("library")
        base = (
            "not recorded" if not self.base else self.base["class"] + (f" ({kind})" if kind else "")
        )
        lines = [
            f"{self.method}, written by {self.writer}, in",
            *_pieces(self.path),
            *_wrap(fields),
            *_wrap(f"base: {base}"),
            *_wrap(
                f"{self.numbers:,} trained numbers, {size_text(self.nbytes)} on disk; every tensor "
                "checked"
            ),
            f"  peft can read it: {'yes' if self.readable_by_peft else 'no'}",
        ]
        ranks = [] if self.ranks is None else ranks_as_text(self.ranks)
        return "\n".join(
            [
                *lines,
                *rows_as_text(self.rows),
                *ranks,
                *(line for n in self.notes for line in _wrap(f"note: {n}")),
            ]
        )


def inspect(path: str | Path) -> Inspection:
    """Read an adapter directory (Weft's or peft's) and check everything that needs no model.

    Raises CheckpointError or UnsupportedError, as `weft.load` would.
    """
    stored = read(path)
    refuse(path, stored.problems)
    size = files.find(path)[0].stat().st_size
    return Inspection(
        str(path),
        type(stored.config).__name__,
        stored.writer,
        methods.to_json(stored.config),
        stored.base,
        _rows(stored),
        stored.numbers,
        size,
        stored.peft_reads_it,
        [*stored.mapped, *stored.notes],
        _ranks(stored),
    )


def _ranks(stored: Stored) -> dict[str, int] | None:
    told = {
        module: site.reached.count("1")
        for module, site in stored.sites.items()
        if site.reached is not None
    }
    return told or None


def _rows(stored: Stored) -> list[Row]:
    rows = []
    for module, site in stored.sites.items():
        held = list(site.tensors.values())
        rows.append(
            Row(
                module,
                site.kind or "linear",
                site.shape or _shape(site),
                sum(t.numel() for t in held),
                sum(t.numel() * t.element_size() for t in held),
            )
        )
    rows += [
        Row(name, "tensor", tuple(t.shape), t.numel(), t.numel() * t.element_size())
        for name, t in stored.selected.items()
    ]
    return rows


def _shape(site: StoredSite) -> tuple[int, ...]:
    """peft does not write (out, in); LoRA's and AdaLoRA's tensors tell both, VeRA's only out."""
    if "P" in site.tensors:
        return (site.tensors["P"].shape[0], site.tensors["Q"].shape[1])
    if "A" in site.tensors:
        return (site.tensors["B"].shape[0], site.tensors["A"].shape[1])
    return tuple(site.tensors["b"].shape)


def _pieces(path: str) -> list[str]:
    """A path on lines of its own; it has no blanks at which it could be wrapped."""
    return [f"  {path[i : i + WIDTH - 2]}" for i in range(0, len(path), WIDTH - 2)]


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )


__all__ = ["Inspection", "inspect"]
