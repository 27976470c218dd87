"""What a comparison recommends, in words: no more than what was tested.

In this order, each leaves no recommendation: too few seeds or rows; a best row that learned nothing
(learned.py); a choice between rows that tie, or differ by one test example. Otherwise it is the
smallest row that learned something and that no test finds worse than the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .comparison import Comparison, Row
from .examples import Gap
from .learned import learned_nothing, one_example
from .statistics import ALPHA, MIN_SEEDS, SAME, Ranking, gap_bound, seeds_needed


@dataclass(frozen=True)
class Verdict:
    """`recommended` is the label of a row, or None; then `why` says what stands against one.
    `headline` has at most 80 characters for the methods' default names.
    """

    recommended: str | None
    headline: str
    why: str


def verdict_of(comparison: Comparison) -> Verdict:
    """Returns the recommendation, or why there is none."""
    ranking = comparison.ranking()
    if ranking is None:
        return Verdict(None, "No ranking", _no_ranking(comparison))
    rows = [comparison.row(label) for label in (ranking.best, *ranking.p)]
    idle = learned_nothing(comparison, rows)
    if ranking.best in idle:
        return Verdict(None, "No recommendation", _nothing_learned(comparison, rows, idle))
    best = comparison.row(ranking.best)
    # A gap of one example is none, whatever a test over the seeds says of it.
    open_ = [
        row
        for row in rows
        if row.label not in idle
        and (not ranking.is_worse(row.label) or _means_alike(comparison, best, row))
    ]
    chosen = min(open_, key=_size)
    rivals = open_ if chosen is best else [best]
    tied = [
        row for row in rivals if row is not chosen and _means_alike(comparison, best, row, chosen)
    ]
    if tied:
        return Verdict(None, "No recommendation", _tie(comparison, [best, chosen, *tied]))
    if chosen is best:
        smaller = [row for row in rows if _size(row) < _size(best)]
        return _best_itself(comparison, ranking, smaller, idle)
    return _smaller_than_best(comparison, ranking, chosen, idle)


def _size(row: Row) -> tuple[int, int]:
    return (row.trainable or 0, row.nbytes or 0)


def _means_alike(comparison: Comparison, *rows: Row) -> bool:
    """Returns True if the means are equal, or one test example apart at most."""
    means = [row.mean or 0.0 for row in rows]
    return max(means) - min(means) <= one_example(comparison, rows[0]) + SAME


def _no_ranking(comparison: Comparison) -> str:
    if comparison.seeds < MIN_SEEDS:
        return (
            f"with {comparison.seeds} seed{'s' * (comparison.seeds != 1)} differences between "
            f"methods may be chance. Use --seeds {MIN_SEEDS} --resume."
        )
    scored = sum(row.complete is not None for row in comparison.rows)
    if len(comparison.rows) > scored:
        return (
            f"only {scored} of {len(comparison.rows)} rows {'has' if scored == 1 else 'have'} all "
            "scores."
        )
    return "there is only one row."


def _nothing_learned(comparison: Comparison, rows: Sequence[Row], idle: Sequence[str]) -> str:
    best = rows[0].label
    who = "no row" if len(idle) == len(rows) else f"{best}, which has the highest mean,"
    if comparison.guess is None:
        text = f"the training loss of {_listed(idle)} did not fall, so nothing was learned"
    else:
        verb = "is shown to be" if len(idle) == len(rows) else "is not shown to be"
        text = f"{who} {verb} better than {_guess_text(comparison)}"
    return (
        f"{text}{_chance_test(comparison)}. Train longer (--budget steps=N), with other learning "
        "rates (--lr), more examples or more seeds."
    )


def _guess_text(comparison: Comparison) -> str:
    assert comparison.guess is not None
    score = comparison.scored_by.with_metric(comparison.guess.score)
    return f"{comparison.guess.what} ({score})"


def _chance_test(comparison: Comparison) -> str:
    if comparison.guess is None:
        return ""
    over = " and over the test examples" if comparison.guess.right else ""
    return f" (one-sided t-test over {comparison.seeds} seeds{over}, Holm-corrected, alpha {ALPHA})"


def _tie(comparison: Comparison, rows: Sequence[Row]) -> str:
    rows = list({row.label: row for row in rows}.values())
    names = _listed([row.label for row in rows])
    means = [row.mean or 0.0 for row in rows]
    gap = max(means) - min(means)
    if len({tuple(row.complete or ()) for row in rows}) == 1:
        what = "have the same score with every seed"
    elif gap <= SAME:
        what = "have the same mean score"
    else:
        examples = round(1 / one_example(comparison, rows[0]))
        what = f"differ by at most one of the {examples:,} test examples in the mean"
    small = min(rows, key=_size)
    behind = [row.label for row in rows[1:] if gap > SAME]  # rows[0] is the best
    apart = [_examples_sentence(comparison.gaps.get(label), label) for label in behind]
    return (
        f"{names} tie: they {what}, so their scores are no reason for one of them. {small.label} "
        f"is the smallest ({small.trainable or 0:,} trainable).{''.join(apart)}"
    )


def _best_itself(
    comparison: Comparison, ranking: Ranking, smaller: Sequence[Row], idle: Sequence[str]
) -> Verdict:
    best = ranking.best
    start, test = f"{best} has the highest mean", test_description(comparison, ranking)
    if not smaller:
        worse = [row for row in ranking.p if ranking.is_worse(row)]
        which = f"of the larger ones, {_listed(worse)}" if worse else "none of the larger ones"
        return Verdict(
            best,
            f"Recommended: {best}, the best and the smallest row",
            f"{start}, and no row with a score is smaller; {which} {_is(worse)} significantly "
            f"worse ({test}).",
        )
    unlearned = [row.label for row in smaller if row.label in idle]
    worse = [row.label for row in smaller if row.label not in idle]
    if not unlearned:
        return Verdict(
            best,
            f"Recommended: {best}, the best; all smaller ones are worse (paired t-test, Holm)",
            f"{start}, and every smaller row is significantly worse ({test}).",
        )
    rest = f"; {_listed(worse)} {_is(worse)} significantly worse ({test})" if worse else ""
    return Verdict(
        best,
        f"Recommended: {best}, the best; no smaller row is as good",
        f"{start}. Of the smaller rows, {_listed(unlearned)} learned nothing"
        f"{_not_better(comparison)}{rest}.",
    )


def _not_better(comparison: Comparison) -> str:
    if comparison.guess is None:
        return ": the training loss did not fall"
    return f": not shown to be better than {_guess_text(comparison)}{_chance_test(comparison)}"


def _smaller_than_best(
    comparison: Comparison, ranking: Ranking, chosen: Row, idle: Sequence[str]
) -> Verdict:
    best, name = comparison.row(ranking.best), chosen.label
    a, b = best.complete or [], chosen.complete or []
    test = test_description(comparison, ranking)
    on_examples = (
        f" and {p_value(ranking.on_examples[name])}" if name in ranking.on_examples else ""
    )
    without = [row for row in idle if _size(comparison.row(row)) < _size(chosen)]
    aside = f" {_listed(without)} learned nothing{_not_better(comparison)}." if without else ""
    reason = (
        f"{name} is the smallest row that is not significantly worse than the best, {best.label} "
        f"({test}; p = {p_value(ranking.p[name])}{on_examples}). It may still be worse: its mean "
        f"is {100 * (sum(a) - sum(b)) / len(a):.1f} points lower, and at 95 % confidence the gap "
        f"is below {100 * gap_bound(a, b):.1f}."
    )
    return Verdict(
        name,
        f"Recommended: {name}, not significantly worse than {best.label} (paired t, Holm, "
        f"p {p_value(ranking.p[name])})",
        f"{reason}{aside}{_examples_sentence(comparison.gaps.get(name))}"
        f"{_advice(a, b, len(ranking.p), comparison.seeds)}",
    )


def test_description(comparison: Comparison, ranking: Ranking) -> str:
    """Returns the name of the statistical test."""
    over = (
        f" and, separately, over the {len(comparison.row(ranking.best).right[0]):,} test examples"
        if ranking.on_examples
        else ""
    )
    return (
        f"one-sided paired t-test over {comparison.seeds} seeds{over}, against {ranking.best}, "
        "Holm-corrected over "
        f"{len(ranking.p)} row{'s' * (len(ranking.p) != 1)}, alpha {ALPHA}"
    )


def _examples_sentence(gap: Gap | None, who: str = "it") -> str:
    """The gap on other test examples. The test over the seeds does not answer this."""
    if gap is None:
        return ""
    low, high = (100 * bound for bound in gap.interval)
    return (
        f" With the same runs, on other examples like these {gap.examples:,}, {who} would be between "
        f"{low:.1f} and {high:.1f} points lower (paired bootstrap over the examples, 95 %)."
    )


def _advice(best: Sequence[float], chosen: Sequence[float], tests: int, seeds: int) -> str:
    needed = seeds_needed(best, chosen, tests)
    if needed is None or needed <= seeds:
        return ""
    if needed > 100:
        return " More than 100 seeds would be needed to see a gap of one point."
    return f" To see a gap of one point, use about {needed} seeds: --seeds {needed} --resume."


def p_value(value: float) -> str:
    """Returns a p-value with two digits."""
    return f"{value:.2g}" if value >= 0.001 else "<0.001"


def _is(names: Sequence[str]) -> str:
    return "are" if len(names) > 1 else "is"


def _listed(names: Sequence[str]) -> str:
    """Returns "A", "A and B" or "A, B and C"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
