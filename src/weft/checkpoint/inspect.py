"""`weft.inspect`: describes an adapter's directory, checked without a model."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import methods
from ..model.plan import ranks_as_text, rows_as_text, size_text
from ..model.plan_entries import Row
from ..untrusted.printable import WIDTH, printable
from . import files
from .checkpoint import Checkpoint, CheckpointLayer
from .conversions import check_fixed, check_shared
from .problems import refuse
from .read import read


@dataclass(frozen=True)
class Inspection:
    """`rows` are those of a plan; `readable_by_peft` is True if `PeftModel.from_pretrained` reads
    the directory; `ranks` are those in force, if the method moves rank between layers. `sampled`
    base tensors are known by some of their numbers, which `load` compares.
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
    ranks: dict[str, int] | None = None
    sampled: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        rows = [{**vars(row), "shape": list(row.shape)} for row in self.rows]
        return {"schema": 1, **vars(self), "rows": rows}

    def __str__(self) -> str:
        """At most 80 columns, without the control characters that a file may have in its names."""
        fields = printable(
            ", ".join(
                f"{k}={v}" for k, v in self.config.items() if k != "method" and v not in ([], None)
            )
        )
        kind = self.base.get("model_type") or self.base.get("library")
        base = (
            "not recorded" if not self.base else self.base["class"] + (f" ({kind})" if kind else "")
        )
        if self.sampled:
            base += f", known by numbers of {self.sampled} tensors"
        lines = [
            f"{self.method}, written by {self.writer}, in",
            *_pieces(printable(self.path)),
            *_wrap(fields),
            *_wrap(f"base: {printable(base)}"),
            *_wrap(
                f"{self.numbers:,} trained numbers, {size_text(self.nbytes)} on disk; every tensor "
                "checked"
            ),
            f"  peft can read it: {'yes' if self.readable_by_peft else 'no'}",
        ]
        ranks = [] if self.ranks is None else ranks_as_text(self.ranks)
        rows = rows_as_text([replace(row, name=printable(row.name)) for row in self.rows])
        notes = [line for n in self.notes for line in _wrap(f"note: {printable(n)}")]
        return "\n".join([*lines, *rows, *ranks, *notes])


def inspect(path: str | Path) -> Inspection:
    """Reads an adapter's directory (of Weft, of a `weft train` run, or of peft) and checks
    everything that needs no model.

    Tensors that a seed decides are drawn again and compared with the checksum in the file.

    Raises CheckpointError or UnsupportedError, as `weft.load` would.
    """
    checkpoint = read(path)
    refuse(path, checkpoint.problems)
    check_fixed(checkpoint)
    check_shared(checkpoint)
    size = files.find(path).tensors.stat().st_size
    return Inspection(
        str(path),
        type(checkpoint.config).__name__,
        checkpoint.writer,
        methods.to_json(checkpoint.config),
        checkpoint.base,
        _plan_rows(checkpoint),
        checkpoint.numbers,
        size,
        checkpoint.peft_reads_it,
        [*checkpoint.mapped, *checkpoint.notes],
        _ranks(checkpoint),
        0 if checkpoint.fingerprint is None else len(checkpoint.fingerprint.sampled),
    )


def _ranks(checkpoint: Checkpoint) -> dict[str, int] | None:
    ranks = {
        module: layer.reached.count("1")
        for module, layer in checkpoint.sites.items()
        if layer.reached is not None
    }
    return ranks or None


def _plan_rows(checkpoint: Checkpoint) -> list[Row]:
    rows = [
        _plan_row(module, layer.kind or "linear", _shape_of(layer), layer.trained())
        for module, layer in checkpoint.sites.items()
    ]
    selected = checkpoint.selected.items()
    rows += [_plan_row(name, "tensor", tuple(t.shape), [t]) for name, t in selected]
    tokens = checkpoint.tokens.items()
    return rows + [_plan_row(name, "tokens", tuple(t.shape), [t]) for name, t in tokens]


def _plan_row(name: str, kind: str, shape: tuple[int, ...], tensors: list[Tensor]) -> Row:
    numbers = sum(t.numel() for t in tensors)
    return Row(name, kind, shape, numbers, sum(t.numel() * t.element_size() for t in tensors))


def _shape_of(layer: CheckpointLayer) -> tuple[int, ...]:
    """(out, in), or (out,) of VeRA in files of peft, which do not record `in`."""
    if layer.shape is None and "b" in layer.tensors:
        return tuple(layer.tensors["b"].shape)
    return layer.known_shape()


def _pieces(path: str) -> list[str]:
    """A path on lines of its own; it has no blanks to wrap at."""
    return [f"  {path[i : i + WIDTH - 2]}" for i in range(0, len(path), WIDTH - 2)]


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )


__all__ = ["Inspection", "inspect"]
