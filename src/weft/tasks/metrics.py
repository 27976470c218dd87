"""GLUE's metrics, by scikit-learn and scipy, on predictions and labels of the same order.

Classes are numbers; F1 and Matthews count class 1 as the positive one. All are fractions, as their
libraries give them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Numbers = Sequence[float]


def accuracy(predicted: Numbers, labels: Numbers) -> float:
    """The share that is equal, in [0, 1]."""
    return sum(a == b for a, b in zip(predicted, labels, strict=True)) / len(labels)


def f1(predicted: Numbers, labels: Numbers) -> float:
    """Of class 1, in [0, 1]; 0 where class 1 is neither predicted nor right."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, zero_division=0.0))


def matthews(predicted: Numbers, labels: Numbers) -> float:
    """Matthews correlation, in [-1, 1]; 0 where one side has a single class."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def pearson(predicted: Numbers, labels: Numbers) -> float | None:
    """In [-1, 1]; None where one side does not vary, so that there is no correlation."""
    from scipy.stats import pearsonr

    return (
        float(pearsonr(predicted, labels).statistic)
        if _varies(predicted) and _varies(labels)
        else None
    )


def spearman(predicted: Numbers, labels: Numbers) -> float | None:
    """Pearson's of the ranks, ties at their mean; None as there."""
    from scipy.stats import spearmanr

    return (
        float(spearmanr(predicted, labels).statistic)
        if _varies(predicted) and _varies(labels)
        else None
    )


def _varies(numbers: Numbers) -> bool:
    return len(set(numbers)) > 1


NO_VARIATION = "there is no correlation with numbers that are all equal."
METRICS: dict[str, Callable[[Numbers, Numbers], float | None]] = {
    "accuracy": accuracy,
    "F1": f1,
    "Matthews": matthews,
    "Pearson": pearson,
    "Spearman": spearman,
}


def of_logits(metric: str, logits: Tensor, labels: Tensor) -> float:
    """A metric from a model's output [n, classes], or [n, 1] where labels are scores. A correlation
    that is not there is 0: what is compared must be a number, and a model that answers every
    example alike has learnt nothing.
    """
    predicted = logits.squeeze(-1) if labels.is_floating_point() else logits.argmax(dim=1)
    return METRICS[metric](predicted.tolist(), labels.tolist()) or 0.0
