"""Runs an experiment: `weft compare` as a process, and its record."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions
from weft.compare.files import write_atomically
from weft.compare.request import parse_budget
from weft.tasks import TaskRef, find_any
from weft.tasks.base import cap

from .experiments import Experiment

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "docs" / "results" / "records"
SCHEMA = 1
KEPT = (
    "task",
    "model",
    "metric",
    "seeds",
    "settings",
    "examples",
    "classes",
    "head",
    "head_trainable",
    "rows",
    "recommendation",
    "no_recommendation",
    "ranking",
    "notes",
)
ROW = (
    "method",
    "config",
    "trainable",
    "bytes",
    "score_mean",
    "score_interval",
    "scores",
    "lr",
    "lr_validation",
    "worse_p",
    "worse_p_examples",
    "example_gap",
    "metrics",
    "peak_bytes",
    "status",
    "reason",
)


def run(experiment: Experiment, data: Path, folder: Path, more: Sequence[str] = ()) -> int:
    """Prepares, compares and writes the record. An interrupted comparison is resumed. Returns the
    exit status.
    """
    data, folder = data.resolve(), folder.resolve()
    work, out = folder / f"{experiment.name}-data", folder / experiment.name
    if experiment.prepare is not None:
        experiment.prepare(data, work)
    words = experiment.command(str(data), str(work), str(out))
    done = subprocess.run([sys.executable, "-m", "weft", *words, "--resume", *more], check=False)
    if (out / "results.json").is_file():
        told = {"{data}": str(data), "{work}": str(work), "{out}": str(out)}
        found = record(
            experiment,
            json.loads((out / "results.json").read_text(encoding="utf-8")),
            told,
            about(work),
            chance(experiment, str(data), str(work)),
        )
        write_atomically(
            RECORDS / f"{experiment.name}.json",
            json.dumps(found, indent=1, ensure_ascii=False) + "\n",
        )
    return done.returncode


def about(work: Path) -> dict[str, Any]:
    """Returns what `prepare` recorded about a model that it trained."""
    path = work / "vit" / "about.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def chance(experiment: Experiment, data: str, work: str) -> float | None:
    """Returns the accuracy of always answering the most frequent class of the test examples, or
    None without classes.
    """
    test = experiment.test.format(data=data, work=work) if experiment.test else None
    ref = find_any(experiment.task.format(data=data, work=work), test)
    if not isinstance(ref, TaskRef):
        return None
    labels = cap(ref.load().splits["test"], parse_budget(experiment.budget).test).labels
    return Counter(labels).most_common(1)[0][1] / len(labels)


def record(
    experiment: Experiment,
    found: Mapping[str, Any],
    places: Mapping[str, str],
    prepared: Mapping[str, Any],
    chance: float | None,
) -> dict[str, Any]:
    """Returns the comparison without curves and step times (the machine had other load), and
    without local paths.
    """
    kept = {key: found[key] for key in KEPT if key in found}
    kept["rows"] = [{key: row.get(key) for key in ROW} for row in found["rows"]]
    text = json.dumps(kept)
    for name, place in sorted(places.items(), key=lambda pair: -len(pair[1])):
        text = text.replace(place, {"{data}": "DATA", "{work}": "WORK", "{out}": "OUT"}[name])
    return {
        "schema": SCHEMA,
        "name": experiment.name,
        "command": command(experiment),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": versions(),
        "prepared": dict(prepared),
        "chance": chance,
        "result": json.loads(text),
    }


def command(experiment: Experiment) -> str:
    """Returns the command for readers, with DATA for the data sets' folder and WORK for the
    preparation's folder.
    """
    return shlex.join(["weft", *experiment.command("DATA", "WORK", "OUT")])
