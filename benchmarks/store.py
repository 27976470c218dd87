"""Results on disk: one JSON file a run, written anew after every case, so that an interrupted run
goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .case import Case
from .claims import evaluate
from .machine import machine, versions
from .timing import summary

SCHEMA = 1
STATUSES = ("ok", "missed", "shown", "unmeasured")
_FIELDS = {
    "schema": int,
    "command": str,
    "date": str,
    "machine": dict,
    "versions": dict,
    "cases": list,
}
_CASE = {
    "name": str,
    "kind": str,
    "setup": dict,
    "contenders": dict,
    "rows": list,
    "kept": dict,
    "rounds": int,
    "seconds": float,
    "load": float,
    "error": str,
}
_ROW = {
    "text": str,
    "metric": str,
    "over": str,
    "status": str,
    "why": str,
    "main": bool,
    "digits": int,
    "note": str,
}


def fresh(command: str) -> dict[str, Any]:
    """A file without cases."""
    return {
        "schema": SCHEMA,
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": machine(),
        "versions": versions(),
        "cases": [],
    }


def entry(
    case: Case, measured: Mapping[str, Any], seconds: float, error: str = ""
) -> dict[str, Any]:
    """What the file holds of a case; one that failed has no samples, all its rows unmeasured, and
    the error.
    """
    samples = measured["samples"]
    rounds = max(
        (len(values) for metrics in samples.values() for values in metrics.values()), default=0
    )
    return {
        "name": case.name,
        "kind": case.kind,
        "setup": asdict(case.setup),
        "rounds": rounds,
        "seconds": float(seconds),
        "load": float(os.getloadavg()[0]),
        "kept": dict(measured.get("kept", {})),
        "notes": list(measured.get("notes", [])),
        "error": error,
        "contenders": {
            name: {metric: summary(values) for metric, values in metrics.items()}
            for name, metrics in samples.items()
        },
        "rows": [evaluate(claim, samples) for claim in case.claims],
    }


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Under a temporary name, flushed, and renamed: a run killed at any point leaves a file that
    can be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError where the file does not follow the schema."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no JSON: {error}. Remove it, or run without --resume."
        ) from None
    check(data, str(path))
    return data


def check(data: Any, where: str) -> None:
    """Every field of its type, every case whole. Raises ValueError naming what is wrong."""
    _fields(data, _FIELDS, where)
    if data["schema"] != SCHEMA:
        raise ValueError(f"{where} has schema {data['schema']}; this reads {SCHEMA}.")
    for case in data["cases"]:
        _fields(case, _CASE, f"{where}: case {case.get('name')!r}")
        for name, metrics in case["contenders"].items():
            for metric, found in metrics.items():
                _fields(
                    found,
                    {"median": float, "quartiles": list, "samples": list},
                    f"{where}: {name} {metric}",
                )
        for row in case["rows"]:
            _fields(row, _ROW, f"{where}: row {row.get('text')!r}")
            if row["status"] not in STATUSES or (row["value"] is None) != (
                row["status"] == "unmeasured"
            ):
                raise ValueError(
                    f"{where}: row {row['text']!r} has status {row['status']!r} and value "
                    f"{row['value']!r}."
                )


def _fields(data: Any, wanted: Mapping[str, type], where: str) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is a {type(data).__name__}, not an object.")
    for name, kind in wanted.items():
        if not isinstance(data.get(name), kind):
            raise ValueError(
                f"{where}: {name!r} is {data.get(name)!r}, not of type {kind.__name__}."
            )


def resume(path: Path, command: str) -> dict[str, Any]:
    """The file to go on with. Raises ValueError where it was made on another machine or with other
    versions.
    """
    new = fresh(command)
    if not path.exists():
        return new
    old = read(path)
    steady = ("cpu", "cores", "threads", "ram", "system")
    pairs = {
        **{k: (old["machine"].get(k), new["machine"][k]) for k in steady},
        **{k: (old["versions"].get(k), v) for k, v in new["versions"].items()},
    }
    differing = [f"{name} was {a!r} and is {b!r}" for name, (a, b) in pairs.items() if a != b]
    if differing:
        raise ValueError(
            f"{path} cannot be resumed: {'; '.join(differing)}. Run without --resume to begin anew."
        )
    return old


def finished(data: Mapping[str, Any], case: Case) -> bool:
    """The file has this case, with the same setup and contenders."""
    return any(
        c["name"] == case.name
        and c["setup"] == asdict(case.setup)
        and set(case.contenders) <= set(c["contenders"])
        for c in data["cases"]
    )


def put(data: dict[str, Any], made: Mapping[str, Any]) -> None:
    """Add a case, in the place of one of its name."""
    data["cases"] = [*(c for c in data["cases"] if c["name"] != made["name"]), made]
