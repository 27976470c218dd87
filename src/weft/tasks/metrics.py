"""GLUE's metrics with scikit-learn and scipy, on predictions and labels in the same order.

Classes are numbers; F1 and Matthews take class 1 as positive. All are fractions as their libraries
return them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

Numbers = Sequence[float]
TRIED = 4  # answers by `constant`; the most frequent one is best for accuracy, and F1 has two


def accuracy(predicted: Numbers, labels: Numbers) -> float:
    """Returns the share of equal entries, in [0, 1]."""
    return sum(a == b for a, b in zip(predicted, labels, strict=True)) / len(labels)


def f1(predicted: Numbers, labels: Numbers) -> float:
    """Returns F1 of class 1, in [0, 1]; 0 if class 1 is neither predicted nor right."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, zero_division=0.0))


def matthews(predicted: Numbers, labels: Numbers) -> float:
    """Returns the Matthews correlation, in [-1, 1]; 0 if one side has a single class."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def pearson(predicted: Numbers, labels: Numbers) -> float | None:
    """Returns Pearson's correlation, in [-1, 1]; None if one side is constant."""
    from scipy.stats import pearsonr

    return (
        float(pearsonr(predicted, labels).statistic)
        if _varies(predicted) and _varies(labels)
        else None
    )


def spearman(predicted: Numbers, labels: Numbers) -> float | None:
    """Returns Spearman's correlation, with mean ranks for ties; None if one side is constant."""
    from scipy.stats import spearmanr

    return (
        float(spearmanr(predicted, labels).statistic)
        if _varies(predicted) and _varies(labels)
        else None
    )


def _varies(numbers: Numbers) -> bool:
    return len(set(numbers)) > 1


def constant(metric: str, labels: Numbers) -> tuple[float, float]:
    """Returns the class, or number, that gives the best score as the answer to every example, and
    that score: what a model reaches that ignores its input. An undefined correlation is 0.
    """
    common = [label for label, _ in Counter(labels).most_common(TRIED)]
    scores = [(METRICS[metric]([label] * len(labels), labels) or 0.0, label) for label in common]
    score, label = max(scores, key=lambda found: found[0])
    return label, score


NO_VARIATION = "the correlation with equal numbers is not defined."
METRICS: dict[str, Callable[[Numbers, Numbers], float | None]] = {
    "accuracy": accuracy,
    "F1": f1,
    "Matthews": matthews,
    "Pearson": pearson,
    "Spearman": spearman,
}


def of_logits(metric: str, logits: Tensor, labels: Tensor) -> float:
    """Returns a metric from a model's output [n, classes], or [n, 1] for a regression, and labels
    [n].

    An undefined correlation is 0: a comparison needs a number, and a model with a constant answer
    has learnt nothing.
    """
    predicted = logits.squeeze(-1) if labels.is_floating_point() else logits.argmax(dim=1)
    return METRICS[metric](predicted.tolist(), labels.tolist()) or 0.0
