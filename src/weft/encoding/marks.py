"""Samples as text, with the tokens in the loss marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .borders import decode
from .rows import IGNORED


def runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """Returns the start and the stop of every run of True."""
    edges = [
        i
        for i in range(len(marks) + 1)
        if (i < len(marks) and marks[i]) != (i > 0 and marks[i - 1])
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


def marked(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> str:
    """Returns the sample as text, with the tokens in the loss between ⟦ and ⟧."""
    out, done = "", ""
    inside = [label != IGNORED for label in labels]
    borders = sorted({0, len(ids), *(edge for run in runs(inside) for edge in run)})
    for start, stop in pairwise(borders):
        text = decode(tokenizer, ids[:stop])
        piece = text[len(done) :]
        out += f"⟦{piece}⟧" if inside[start] else piece
        done = text
    return out
