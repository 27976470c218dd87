"""The metrics of the shapes tasks, each that of the real data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ..multimodal.answers import vqa_accuracy
from .examples import Example

METRICS = {
    "shapes-vqa": "VQA accuracy",
    "shapes-nlvr": "accuracy",
    "shapes-caption": "CIDEr",
    "shapes-video": "accuracy",
}


def most_frequent(asked: Sequence[Example]) -> list[str]:
    """Returns per example the most frequent answer to questions that begin alike."""
    groups: dict[str, Counter[str]] = {}
    kinds = [" ".join(one.text.split()[:3]) for one in asked]
    for kind, one in zip(kinds, asked, strict=True):
        groups.setdefault(kind, Counter())[one.target] += 1
    best = {kind: counts.most_common(1)[0][0] for kind, counts in groups.items()}
    return [best[kind] for kind in kinds]


def accuracy(texts: Sequence[str], asked: Sequence[Example]) -> tuple[float, str | None]:
    """Returns the share of answers that are the right one, and "1" or "0" per example."""
    right = "".join("01"[t.strip() == e.target] for t, e in zip(texts, asked, strict=True))
    return right.count("1") / len(right), right


def vqa(texts: Sequence[str], asked: Sequence[Example]) -> tuple[float, str | None]:
    """Returns the mean VQA accuracy by the official rule, in [0, 1]."""
    each = [vqa_accuracy(t, e.references) for t, e in zip(texts, asked, strict=True)]
    return sum(each) / len(each), None


def cider(texts: Sequence[str], asked: Sequence[Example]) -> tuple[float, str | None]:
    """Returns CIDEr in [0, 10] on words; the texts have no punctuation and no capitals."""
    from pycocoevalcap.cider.cider import Cider

    wanted = {i: list(one.references) for i, one in enumerate(asked)}
    found = {i: [text] for i, text in enumerate(texts)}
    return float(Cider().compute_score(wanted, found)[0]), None


SCORERS: dict[str, Callable[[Sequence[str], Sequence[Example]], tuple[float, str | None]]] = {
    "shapes-vqa": vqa,
    "shapes-nlvr": accuracy,
    "shapes-caption": cider,
    "shapes-video": accuracy,
}
