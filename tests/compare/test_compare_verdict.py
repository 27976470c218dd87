"""The recommendation claims what was tested and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_compare_report import found_with, lost

from weft.compare.plan.scale import Scale
from weft.compare.report import data, document, table
from weft.compare.report.comparison import Comparison, Row
from weft.compare.report.learned import learned_nothing
from weft.compare.report.verdict import verdict_of
from weft.compare.tasks.base import Guess
from weft.tasks.metrics import constant, of_logits

MANY = 1000
HALF = Guess(0.5, "giving 'a', the most frequent class, to every example", "01" * (MANY // 2))


def row(label: str, scores: list[float], trainable: int, **changes) -> Row:
    return lost(
        label=label, scores=scores, trainable=trainable, nbytes=4 * trainable, reason=None,
        runs=[], lr=1e-2, **changes,
    )  # fmt: skip


def compared(*rows: Row, guess: Guess | None = HALF, **changes) -> Comparison:
    found = found_with(list(rows))
    return replace(found, guess=guess, sizes={"train": 30, "test": MANY}, **changes)


def marks(scores: list[float]) -> list[str]:
    """Which of the examples are right, so that their shares are the scores."""
    return ["1" * round(MANY * s) + "0" * (MANY - round(MANY * s)) for s in scores]


def everywhere(comparison: Comparison) -> str:
    """All texts, which must say the same; the JSON has a recommendation or a reason."""
    verdict, found = verdict_of(comparison), data.to_json(comparison)
    origin = document.Origin(command="c", date="d", machine="m", versions={})
    page = str(document.document(comparison, origin, [])[0].parts)
    printed = " ".join(table.table_text(comparison).split())
    assert verdict.why in printed and verdict.why.replace("'", "") in page.replace("'", "").replace(
        "\\", ""
    )
    if verdict.recommended is None:
        assert found["recommendation"] is None and found["no_recommendation"] == verdict.why
        assert "Recommended" not in printed
    else:
        assert found["recommendation"] == {"method": verdict.recommended, "why": verdict.why}
        assert found["no_recommendation"] is None
    return f"{verdict.headline}: {verdict.why}"


def test_two_rows_at_nothing_are_not_recommended() -> None:
    """CoLA after 20 steps, as reported: Matthews 0.0 ± 0.0 for both."""
    guess = Guess(0.0, "giving the same class to every example")
    found = compared(
        row("LoRA", [0.0] * 3, 100), row("VeRA", [0.0] * 3, 10), guess=guess, metric="Matthews"
    )
    assert everywhere(found).startswith(
        "No recommendation: no row is shown to be better than giving the same class to every example"
    )


def test_wide_scores_around_nothing_are_not_recommended() -> None:
    """STS-B, as reported: 5.3 ± 32.3 and 12.7 ± 23.9 Pearson."""
    guess = Guess(0.0, "giving the same number to every example")
    found = compared(
        row("LoRA", [-0.077, 0.183, 0.053], 100),
        row("VeRA", [0.031, 0.127, 0.223], 10),
        guess=guess, metric="Pearson", kind="regression",
    )  # fmt: skip
    assert found.row("VeRA").interval[0] < 0
    assert everywhere(found).startswith("No recommendation: no row is shown to be better than")


def test_the_level_of_the_majority_class_is_named_with_its_score() -> None:
    guess = Guess(0.688, "giving 'b', the most frequent class, to every example")
    found = compared(
        row("LoRA", [0.688, 0.689, 0.687], 100), row("VeRA", [0.688] * 3, 10), guess=guess
    )
    assert "giving 'b', the most frequent class, to every example (68.8 %)" in everywhere(found)
    assert data.to_json(found)["guess"] == {"score": 0.688, "what": guess.what}


def test_one_example_above_the_guess_with_every_seed_is_not_learned() -> None:
    above = [0.5 + 1 / MANY] * 3  # a constant gap: the paired test over the seeds says p = 0
    found = compared(row("LoRA", above, 100), row("VeRA", [0.5] * 3, 10), guess=HALF)
    assert learned_nothing(found, found.rows) == ["LoRA", "VeRA"]
    assert verdict_of(found).recommended is None


def test_the_examples_can_show_what_few_seeds_cannot() -> None:
    scores = [0.55, 0.75, 0.95]
    wide, clear = row("A", scores, 9), row("A", scores, 9, right=marks(scores))
    assert learned_nothing(compared(wide), [wide]) == ["A"]
    assert learned_nothing(compared(clear), [clear]) == []


def test_a_best_row_that_learned_nothing_gives_no_recommendation() -> None:
    found = compared(row("LoRA", [0.55, 0.75, 0.95], 100), row("VeRA", [0.70, 0.71, 0.69], 10))
    said = everywhere(found)
    assert "LoRA, which has the highest mean, is not shown to be better than" in said


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ([0.9, 0.8, 0.85], [0.9, 0.8, 0.85], "have the same score with every seed"),
        ([0.9, 0.8, 0.85], [0.85, 0.9, 0.8], "have the same mean score"),
        ([0.9, 0.8, 0.85], [0.899, 0.799, 0.849], "differ by at most one of the 1,000 test"),
        ([0.9, 0.8, 0.85], [0.9, 0.8, 0.849], "differ by at most one of the 1,000 test"),
    ],
)
@pytest.mark.parametrize("small_first", [True, False])
def test_rows_that_tie_are_not_recommended(one, other, says, small_first) -> None:
    sizes = (10, 100) if small_first else (100, 10)
    found = compared(row("LoRA", one, sizes[0]), row("VeRA", other, sizes[1]))
    said = everywhere(found)
    assert said.startswith("No recommendation: ") and "tie: they" in said and says in said
    assert f"{'LoRA' if small_first else 'VeRA'} is the smallest (10 trainable)" in said


def test_a_tie_of_larger_rows_does_not_matter() -> None:
    found = compared(
        row("A", [0.90, 0.91, 0.92], 100),
        row("B", [0.90, 0.91, 0.92], 90),
        row("C", [0.87, 0.93, 0.89], 10),
    )
    assert verdict_of(found).recommended == "C"


def test_the_best_row_is_the_smallest() -> None:
    found = compared(row("LoRA", [0.70, 0.71, 0.72], 100), row("VeRA", [0.90, 0.91, 0.93], 10))
    said = everywhere(found)
    assert said.startswith("Recommended: VeRA, the best and the smallest row: ")
    assert "no row with a score is smaller; of the larger ones, LoRA is significantly worse" in said
    assert "every smaller row" not in said
    near = compared(row("LoRA", [0.89, 0.93, 0.90], 100), row("VeRA", [0.90, 0.91, 0.93], 10))
    assert "none of the larger ones is significantly worse" in everywhere(near)


def test_every_smaller_row_was_tested_where_that_is_said() -> None:
    best, worse = row("LoRA", [0.90, 0.91, 0.93], 100), row("VeRA", [0.70, 0.71, 0.72], 10)
    assert "every smaller row is significantly worse" in everywhere(compared(best, worse))
    wide = row("Head", [0.2, 0.5, 0.95], 5)  # neither worse by the test nor above the guess
    said = everywhere(compared(best, worse, wide))
    assert said.startswith("Recommended: LoRA, the best; no smaller row is as good")
    assert "Of the smaller rows, Head learned nothing" in said
    assert "VeRA is significantly worse" in said and "every smaller row" not in said


def test_a_smaller_row_that_learned_nothing_is_passed_over_and_named() -> None:
    found = compared(
        row("A", [0.90, 0.91, 0.93], 100),
        row("B", [0.88, 0.93, 0.91], 50),
        row("C", [0.2, 0.5, 0.95], 5),
    )
    said = everywhere(found)
    assert said.startswith("Recommended: B, not significantly worse than A")
    assert "C learned nothing: not shown to be better than" in said


def test_without_a_known_guess_the_loss_must_have_fallen() -> None:
    falling, flat = [[3.0, 2.0, 1.0]] * 3, [[2.0, 2.1, 2.0]] * 3
    made = {"guess": None, "metric": "BLEU", "kind": "generation"}
    a, b = [0.30, 0.31, 0.33], [0.20, 0.21, 0.23]
    idle = compared(row("A", a, 9, curves=flat), row("B", b, 5, curves=flat), **made)
    assert "the training loss of A and B did not fall" in everywhere(idle)
    fine = compared(row("A", a, 9, curves=falling), row("B", b, 5, curves=falling), **made)
    assert verdict_of(fine).recommended == "A"


@pytest.mark.parametrize(
    ("metric", "labels", "score"),
    [
        ("accuracy", [0, 1, 1, 2], 0.5),
        ("F1", [0, 0, 0, 1], 0.4),  # class 1 for all: precision 1/4, recall 1
        ("Matthews", [0, 1, 1], 0.0),
        ("Pearson", [0.5, 1.5, 1.5], 0.0),
        ("Spearman", [0.5, 1.5, 2.5], 0.0),
    ],
)
def test_the_guess_is_the_best_constant_answer(metric, labels, score) -> None:
    label, best = constant(metric, labels)
    assert best == pytest.approx(score)
    if metric in ("accuracy", "F1", "Matthews"):
        logits = torch.zeros(len(labels), 3)
        logits[:, int(label)] = 1.0
        assert of_logits(metric, logits, torch.tensor(labels)) == pytest.approx(score)
    assert Scale(metric).with_metric(best)


def test_the_guess_of_a_task_with_text_answers_is_one_answer_per_data_set() -> None:
    from weft.compare.tasks.generated import _guess
    from weft.tasks import GenerationTask

    def record(group: str, answer: str) -> dict:
        return {"prompt": "p", "references": [answer], "group": group}

    def task(records, right=lambda text, record: text == record["references"][0]):
        return GenerationTask("t", [], {"test": records}, {}, "accuracy", None, right=right)

    one = [record("a", answer) for answer in ("yes", "no", "yes", "yes")]
    two = [*one, record("b", "no"), record("b", "yes")]
    assert _guess(task(one), one) == Guess(0.75, "giving the same answer to every example", "1011")
    assert _guess(task(two), two).score == (0.75 + 0.5) / 2
    assert _guess(task(two), two).right is None  # the score is a mean over the sets
    assert _guess(task(one, right=None), one) is None
