"""A comparison for programs: JSON (schema 1) and CSV."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, fields, replace
from typing import Any

from ... import __version__
from ..plan.entries import format_rate
from .comparison import Comparison, Row, Run
from .examples import Gap
from .statistics import Ranking
from .verdict import test_description, verdict_of

SCHEMA = 1


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Returns the comparison as JSON values, with schema 1 of `weft compare --json`."""
    ranking, verdict = comparison.ranking(), verdict_of(comparison)
    recommended = verdict.recommended
    return {
        "schema": SCHEMA,
        "task": comparison.task,
        "model": comparison.model,
        "metric": comparison.metric,
        "weft": __version__,
        "kind": comparison.kind,
        "validation": {
            "metric": comparison.chosen_by.metric,
            "lowest_is_best": comparison.chosen_by.lowest,
        },
        "seeds": comparison.seeds,
        "settings": dict(comparison.settings),
        "examples": dict(comparison.sizes),
        "classes": list(comparison.classes),
        "head": list(comparison.head),
        "head_trainable": comparison.head_trainable,
        "rows": [
            _row_json(row, ranking, comparison.gaps.get(row.label)) for row in comparison.rows
        ],
        "recommendation": {"method": recommended, "why": verdict.why} if recommended else None,
        "no_recommendation": None if recommended else verdict.why,
        "guess": None
        if comparison.guess is None
        else {"score": comparison.guess.score, "what": comparison.guess.what},
        "ranking": _ranking_json(comparison, ranking) if ranking else None,
        "device": comparison.device,
        "versions": dict(comparison.versions),
        "notes": list(comparison.notes),
    }


def rows_csv(comparison: Comparison) -> str:
    """Returns one line per row. Numbers are as in the JSON; missing ones are empty."""
    columns = [
        "method",
        "trainable",
        "head_trainable",
        "bytes",
        "score_mean",
        "score_low",
        "score_high",
        *(f"score_seed_{seed}" for seed in range(comparison.seeds)),
        "lr",
        "step_ratio",
        "peak_bytes",
        "status",
        "reason",
        "steps",
        "budget",
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in comparison.rows:
        low, high = row.interval or (None, None)
        writer.writerow(
            [
                row.label,
                row.trainable,
                row.head_trainable,
                row.nbytes,
                row.mean,
                low,
                high,
                *row.scores,
                row.lr,
                row.cost.get("step_ratio"),
                row.cost.get("peak_bytes"),
                row.status,
                row.reason,
                row.steps,
                comparison.settings["budget"],
            ]
        )
    return out.getvalue()


def runs_csv(comparison: Comparison) -> str:
    """Returns one line per training run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    plain = [field.name for field in fields(Run) if field.name != "scores"]
    writer.writerow(["method", *plain, "status", *(f"test_{name}" for name in comparison.metrics)])
    for row in comparison.rows:
        runs = [replace(run, earlier="; ".join(run.earlier)) for run in row.runs]
        writer.writerows(
            [
                row.label,
                *(getattr(run, name) for name in plain),
                run.status,
                *(run.scores.get(name) for name in comparison.metrics),
            ]
            for run in runs
        )
    return out.getvalue()


def to_json_text(comparison: Comparison) -> str:
    """Returns the JSON file."""
    return json.dumps(to_json(comparison), indent=1, ensure_ascii=False) + "\n"


def _ranking_json(comparison: Comparison, ranking: Ranking) -> dict[str, Any]:
    return {
        "best": ranking.best,
        "worse_p": dict(ranking.p),
        "worse_p_examples": dict(ranking.on_examples),
        "test": test_description(comparison, ranking),
    }


def _row_json(row: Row, ranking: Ranking | None, gap: Gap | None) -> dict[str, Any]:
    return {
        "method": row.label,
        "config": dict(row.config),
        "trainable": row.trainable,
        "head_trainable": row.head_trainable,
        "bytes": row.nbytes,
        "score_mean": row.mean,
        "steps": row.steps,
        "score_interval": list(row.interval) if row.interval else None,
        "scores": list(row.scores),
        "step_ratio": row.cost.get("step_ratio"),
        "step_ratio_spread": row.cost.get("step_ratio_spread"),
        "step_seconds": row.cost.get("step_seconds"),
        "limit_seconds": row.cost.get("limit_seconds"),
        "peak_bytes": row.cost.get("peak_bytes"),
        "lr": row.lr,
        "lr_validation": {format_rate(lr): score for lr, score in row.tried.items()},
        "worse_p": ranking.p.get(row.label) if ranking else None,
        "worse_p_examples": ranking.on_examples.get(row.label) if ranking else None,
        "example_gap": {"mean": gap.mean, "interval": list(gap.interval), "examples": gap.examples}
        if gap
        else None,
        "metrics": row.metrics,
        "adapter": row.adapter,
        "status": row.status,
        "reason": row.reason,
        "runs": [{**asdict(run), "status": run.status} for run in row.runs],
    }
