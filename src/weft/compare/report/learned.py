"""Which rows learned nothing: they are not shown to be better than an answer that ignores its
input.

The scores of a row are tested against that answer (`Guess`) over the seeds and over the test
examples, one-sided and Holm-corrected over the rows, as rows are tested against each other. If no
such answer is known, the training loss must have fallen.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from .comparison import Comparison, Row
from .examples import shares
from .statistics import ALPHA, SAME, holm, worse


def learned_nothing(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    """Returns the labels of those of `rows`, all with complete scores, that learned nothing."""
    guess = comparison.guess
    if guess is None:
        return [row.label for row in rows if not _loss_fell(row)]
    over_seeds = holm([worse(row.complete or [], [guess.score] * len(row.scores)) for row in rows])
    over_examples = _over_examples(rows, guess.right)
    found = []
    for row, p in zip(rows, over_seeds, strict=True):
        p = min(p, over_examples.get(row.label, 1.0))
        above = (row.mean or 0.0) - guess.score
        if p >= ALPHA or above <= one_example(comparison, row) + SAME:
            found.append(row.label)
    return found


def one_example(comparison: Comparison, row: Row) -> float:
    """Returns how much one test example changes the score at least, or 0 if the metric does not
    tell.
    """
    if row.right and comparison.guess is None:
        return 1 / len(row.right[0])
    return 1 / comparison.sizes["test"] if comparison.kind == "classification" else 0.0


def _over_examples(rows: Sequence[Row], right: str | None) -> dict[str, float]:
    known = [row for row in rows if right and row.right and len(row.right[0]) == len(right)]
    p = [worse(list(shares(row.right)), list(shares([right or ""]))) for row in known]
    return dict(zip((row.label for row in known), holm(p), strict=True))


def _loss_fell(row: Row) -> bool:
    """Returns True if the mean loss of the last third of the steps is below that of the first."""
    firsts: list[float] = []
    lasts: list[float] = []
    for curve in row.curves:
        third = max(1, len(curve) // 3)
        firsts += curve[:third]
        lasts += curve[-third:]
    return not firsts or mean(lasts) < mean(firsts)
