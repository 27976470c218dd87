"""Writes the tables of docs/claims.md from docs/records/claims.json, a file of scripts/claims.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORD = Path(__file__).resolve().parent.parent / "docs" / "records" / "claims.json"
NOT_RUN = "Not run yet.\n"
LONG = '<div class="long-names" markdown>\n\n{}\n</div>\n'  # the first column may wrap
TITLES = {
    "svd": "LoRA's update is low-rank, and like an SVD",
    "orthogonal": "Random A and B have nearly orthogonal rows",
    "freedom": "Any update of rank r is a combination of the random bases",
    "vera": "VeRA matches LoRA with a tenth of the parameters",
    "coupling": "LoRA moves magnitude and direction together; full fine-tuning and DoRA do not",
    "noise": "Control: random updates move them together too",
    "half-rank": "DoRA at half the rank beats LoRA",
    "inference": "No extra cost at inference",
}


def recorded() -> dict[str, Any]:
    """Claim -> its findings, with command, date and machine."""
    return json.loads(RECORD.read_text(encoding="utf-8"))["claims"] if RECORD.is_file() else {}


def claim(name: str) -> str:
    """The findings of one claim as a Markdown table."""
    found = recorded().get(name)
    if found is None:
        return NOT_RUN
    rows = [
        f"| {one['what'].replace('|', chr(92) + '|')} | {_number(one['value'])} | "
        f"{_interval(one['interval'])} "
        f"| {one['rule']} | {one['verdict']} |\n"
        for one in found["findings"]
    ]
    rates = ", ".join(f"{label} {value:g}" for label, value in found["rates"].items())
    head = "| measured | value | 95 % interval | decides | verdict |\n| --- | ---: | ---: | --- | --- |\n"
    return (
        LONG.format(head + "".join(rows))
        + (f"\nPeak learning rates, chosen on validation data: {rates}.\n" if rates else "")
        + f"\n`{found['command']}`, {found['date']}, {found['machine']}.\n"
    )


def verdicts() -> str:
    """The number of verdicts per claim."""
    rows, found = [], recorded()
    for name, title in TITLES.items():
        lines = [one["verdict"] for one in found[name]["findings"]] if name in found else []
        told = ", ".join(
            f"{lines.count(v)} {v}" for v in ("seen", "not seen", "cannot tell") if v in lines
        )
        rows.append(f"| {title} | {told or 'not run yet'} |\n")
    return LONG.format("| claim | lines |\n| --- | --- |\n" + "".join(rows))


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) and abs(value) > 1 else f"{value:.3g}"


def _interval(interval: list[float] | None) -> str:
    return "exact" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"
