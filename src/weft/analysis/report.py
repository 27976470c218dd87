"""An analysis as text of 80 columns, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from statistics import mean
from typing import Any

from ..untrusted.printable import WIDTH
from .analyze import Analysis, RunAnalysis
from .relate import LEVELS, Interval, Relation

# What the paper prints (arXiv:2402.09353, section 3.2 and figure 2): VL-BART, query matrices, 24
# points, no intervals.
PRINTED = {"Full": -0.62, "LoRA": 0.83, "DoRA": -0.31}
_LONGEST = 20  # characters of a role's name in the tables
_HEAD = f"{'':<{_LONGEST}} {'':<8}{'points':>6}{'r':>7}  {'95 % interval':<14}{'slope':>9}  sign"


def analysis_text(analysis: Analysis, model: str) -> str:
    """Returns the results, run by run."""
    lines = _wrap(
        f"Magnitude and direction of {len(analysis.matrices)} matrices of {model}, relative to "
        "the base. Delta D: mean of 1 - cos of a row before and after. Delta M: mean change of a "
        "row's length. r: their correlation over all points, between matrices (means over time), "
        "and within a matrix over time."
    )
    for run in analysis.runs:
        lines += ["", *_changes(run), "", _HEAD, *_relations(run), *_paper(run)]
    for note in analysis.notes:
        lines += ["", *_wrap(f"note: {note}")]
    return "\n".join(lines)


def analysis_json(analysis: Analysis, model: str) -> dict[str, Any]:
    """Returns plain JSON values."""
    return {
        "schema": 1,
        "model": model,
        "matrices": list(analysis.matrices),
        "runs": [_run_text(run) for run in analysis.runs],
        "left_out": {label: list(names) for label, names in analysis.left_out.items()},
        "notes": list(analysis.notes),
    }


def _run_text(run: RunAnalysis) -> dict[str, Any]:
    return {
        "label": run.label,
        "method": run.method,
        "config": dict(run.config),
        "checkpoints": [{"step": step, "path": str(path)} for step, path in run.places],
        "points": [vars(point) for point in run.points],
        "relations": [
            {"role": role, **vars(relation), "sign": relation.sign}
            for role, levels in run.relations.items()
            for relation in levels
        ],
        "paper_r": PRINTED.get(run.method),
    }


def _changes(run: RunAnalysis) -> list[str]:
    """Mean changes by role, at the first and the last checkpoint."""
    steps = list(dict.fromkeys([run.steps[0], run.steps[-1]]))
    count = f"{len(run.steps)} checkpoint{'s' * (len(run.steps) != 1)}"
    lines = [
        *_wrap(f"{run.label} ({run.method}), {count}"),
        f"{'':<{_LONGEST}}" + "".join(f"{f'step {step}':>27}" for step in steps),
        f"{'mean over matrices':<{_LONGEST}}" + f"{'delta D':>15}{'delta M':>12}" * len(steps),
    ]
    for role in run.relations:
        cells = ""
        for step in steps:
            points = [p for p in run.of(role) if p.step == step]
            cells += (
                f"{mean(p.delta_d for p in points):>15.3e}{mean(p.delta_m for p in points):>12.3e}"
            )
        lines.append(f"{_short(role):<{_LONGEST}}{cells}")
    return lines


def _relations(run: RunAnalysis) -> list[str]:
    lines = []
    for role, levels in run.relations.items():
        for relation in levels:
            name = _short(role) if relation.level == LEVELS[0] else ""
            lines.append(
                f"{name:<{_LONGEST}} "
                f"{relation.level:<8}{relation.points:>6}{_values(relation)}".rstrip()
            )
    return lines


def _values(relation: Relation) -> str:
    if relation.r is None:
        return f"{'-':>7}  {relation.why}"
    sign = relation.sign if relation.r_interval else "no interval"
    slope = relation.slope if relation.slope is not None else 0.0
    return f"{relation.r:>+7.2f}  {_interval(relation.r_interval):<14}{slope:>9.2g}  {sign}"


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"


def _paper(run: RunAnalysis) -> Sequence[str]:
    printed = PRINTED.get(run.method)
    if printed is None:
        return []
    sign = "negative" if printed < 0 else "positive"
    signs = [levels[0].sign for levels in run.relations.values()]
    verdicts: dict[str, list[str]] = {}
    for role, here in zip(run.relations, signs, strict=True):
        verdicts.setdefault(_verdict(here, sign), []).append(_short(role))
    seen = "; ".join(f"{verdict}: {', '.join(roles)}" for verdict, roles in verdicts.items())
    return [
        "",
        *_wrap(
            f"The paper prints r = {printed:+.2f} for {_PAPERS_NAME[run.method]} (pooled; VL-BART, "
            "query "
            f"matrices, 24 points). Do the pooled rows here have this sign ({sign})? "
            f"{seen[0].upper()}{seen[1:]}."
        ),
    ]


_PAPERS_NAME = {"Full": "full fine-tuning", "LoRA": "LoRA", "DoRA": "DoRA"}


def _verdict(here: str, printed: str) -> str:
    if here in ("none", "unclear"):
        return "cannot tell"
    return "seen" if here == printed else "the opposite"


def _short(role: str) -> str:
    """Shortens a name from the left: its end says more."""
    return role if len(role) <= _LONGEST else "…" + role[1 - _LONGEST :]


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)
