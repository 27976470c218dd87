"""NLVR2: whether a sentence is true of two images. Accuracy, and consistency: the share of
sentences that are judged right for all their pairs of images. Source: the tool of lil-lab/nlvr.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import WeftError
from ..generation import Report
from . import by_id

_WORDS = {"true": True, "false": False, "1": True, "0": False}


def accuracy_and_consistency(right: Mapping[str, bool]) -> tuple[float, float]:
    """Returns both in [0, 1] for identifiers `split-set-pair-sentence`. Pairs of one sentence share
    all but the third part.
    """
    groups: dict[str, list[bool]] = defaultdict(list)
    for name, one in right.items():
        parts = name.split("-")
        groups["-".join(parts[:2] + parts[3:])].append(one)
    return sum(right.values()) / len(right), sum(map(all, groups.values())) / len(groups)


def score_nlvr2(references: Path, outputs: Path) -> Report:
    """Scores predictions against the authors' JSON lines with `identifier` and `label`.
    Predictions: a .csv with `identifier` and `prediction` (True or False), JSON lines of the same,
    or `{identifier: label}`. Raises WeftError.
    """
    wanted = _labels(references, by_id.rows(references), ("label",))
    given = None if outputs.suffix == ".csv" else by_id.read_json(outputs)
    if isinstance(given, dict) and not {"identifier", "prediction", "label"} & given.keys():
        listed: list[by_id.Row] = [{"identifier": k, "prediction": v} for k, v in given.items()]
    else:
        listed = by_id.rows(outputs)
    found = _labels(outputs, listed, ("prediction", "label"))
    ids = by_id.matched(references, wanted, outputs, found)
    accuracy, consistency = accuracy_and_consistency({n: found[n] == wanted[n] for n in ids})
    return Report({"accuracy": accuracy, "consistency": consistency})


def _labels(path: Path, listed: list[by_id.Row], fields: tuple[str, ...]) -> dict[str, bool]:
    read = by_id.by_id(path, listed, ("identifier", "uid"), fields)
    return {name: _truth(path, name, value) for name, value in read.items()}


def _truth(path: Path, name: str, value: Any) -> bool:
    found = _WORDS.get(str(value).strip().lower())
    if found is None or isinstance(value, float):
        raise WeftError(f"{path}, id {name!r}: {value!r} is neither True nor False.")
    return found


SCORERS = {"nlvr2": score_nlvr2}
