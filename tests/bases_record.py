"""What the tests of the kinds of base layers found, one row per base and method: the table of
docs/bases.md is made from these rows (scripts/docs_bases.py).

A test ends with `exact(...)` or `refused(...)`. With WEFT_RECORD_BASES=1 the row is written to
docs/records/bases/<FILE>.json, where FILE is the test file's name without "test_". Otherwise the row
there must have the same verdict and reason: what the page says is what the tests say.
"""

from __future__ import annotations

import inspect
import json
import os
from importlib.metadata import version
from pathlib import Path

RECORDS = Path(__file__).resolve().parents[1] / "docs" / "records" / "bases"
VERDICTS = ("exact", "refused", "not tried")


def exact(base: str, method: str, library: str = "torch", needs: str = "") -> None:
    """The method over this kind of base computes and learns what it does over dense weights.

    base: the kind, as the page names it ("NF4"). method: a name in METHODS, or a verb ("merge").
    library: the package that has the layers, by its name for pip. needs: "CUDA" if nothing less will do.
    """
    note(base, method, "exact", "", library, needs)


def refused(base: str, method: str, reason: str, library: str = "torch", needs: str = "") -> None:
    """It is refused, with this reason: the part of the message that is the same for every layer."""
    note(base, method, "refused", reason, library, needs)


def untried(base: str, method: str, reason: str, library: str = "torch", needs: str = "") -> None:
    """Nothing here could try it, for this reason. Written down only; it may be true elsewhere."""
    note(base, method, "not tried", reason, library, needs)


def note(base: str, method: str, verdict: str, reason: str, library: str, needs: str) -> None:
    """Writes a row, or holds the one that is written to it (AssertionError)."""
    assert verdict in VERDICTS
    path = RECORDS / f"{_caller()}.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    row = {
        "base": base,
        "library": library,
        "version": _version(library),
        "method": method,
        "verdict": verdict,
        "reason": reason,
        "needs": needs,
    }
    at = next((i for i, r in enumerate(rows) if (r["base"], r["method"]) == (base, method)), None)
    if not os.environ.get("WEFT_RECORD_BASES"):
        found = None if at is None else rows[at]
        assert found is not None and all(
            found[key] == row[key] for key in ("library", "verdict", "reason", "needs")
        ), (
            f"{path.name} does not say {base}, {method}: {verdict} ({reason}), but {found}; run the "
            "test with WEFT_RECORD_BASES=1 (or `make bases RECORD=1`) and commit what it writes, then `make docs-tables`"
        )
        return
    if at is None:
        rows.append(row)
    else:
        rows[at] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n ".join(json.dumps(r, ensure_ascii=False) for r in rows)
    path.with_suffix(".tmp").write_text(f"[\n {text}\n]\n", encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


def _caller() -> str:
    for frame in inspect.stack():
        stem = Path(frame.filename).stem
        if stem.startswith("test_"):
            return stem.removeprefix("test_")
    raise LookupError("no test file calls")


def _version(library: str) -> str:
    return version(library).partition("+")[0] if library else ""
