"""`weft.inspect`: what an adapter directory is, checked without a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import methods
from ..model.plan import Row, rows_as_text, size_text
from . import files
from .content import Stored, refuse
from .load import read


@dataclass(frozen=True)
class Inspection:
    """`rows` as in a plan; `readable_by_peft` says whether `PeftModel.from_pretrained` reads the directory."""

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

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **vars(self), "rows": [vars(row) for row in self.rows]}

    def __str__(self) -> str:
        fields = ", ".join(f"{k}={v}" for k, v in self.config.items() if k not in ("method", "targets", "modules_to_save"))
        base = f"{self.base['class']}" + (f" ({self.base['model_type']})" if self.base.get("model_type") else "") \
            if self.base else "not recorded"
        lines = [f"{self.method} in {self.path}, written by {self.writer}", f"  {fields}", f"  base model: {base}",
                 f"  {self.numbers:,} numbers, {size_text(self.nbytes)} on disk; every tensor checked",
                 f"  peft can read it: {'yes' if self.readable_by_peft else 'no'}"]
        return "\n".join([*lines, *rows_as_text(self.rows), *(f"note: {note}" for note in self.notes)])


def inspect(path: str | Path) -> Inspection:
    """Read an adapter directory (Weft's or peft's) and check everything that needs no model.

    Raises CheckpointError or UnsupportedError, as `weft.load` would.
    """
    stored = read(path)
    refuse(path, stored.problems)
    tensors_file, config_file = files.find(path)
    kind = files.read_config(config_file).get("peft_type", "") if config_file else "WEFT_"
    return Inspection(str(path), type(stored.config).__name__, stored.writer, methods.to_json(stored.config), stored.base,
                      _rows(stored), stored.numbers, tensors_file.stat().st_size, not str(kind).startswith("WEFT_"),
                      stored.notes)


def _rows(stored: Stored) -> list[Row]:
    rows = []
    for module, site in stored.sites.items():
        held = site.tensors.values()
        rows.append(Row(module, site.kind or "linear", site.shape or (), sum(t.numel() for t in held),
                        sum(t.numel() * t.element_size() for t in held)))
    rows += [Row(name, "tensor", tuple(t.shape), t.numel(), t.numel() * t.element_size())
             for name, t in stored.selected.items()]
    return rows


__all__ = ["Inspection", "inspect"]
