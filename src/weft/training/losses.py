"""The loss and the metrics of each kind of model, which do not depend on the model's class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from ..encoding.rows import IGNORED
from ..errors import WeftError
from ..tasks.metrics import METRICS as METRIC_FUNCTIONS
from .scored import at, next_tokens

LOWER_IS_BETTER = ("loss", "perplexity")
METRICS = {
    "causal-lm": ("loss", "perplexity", "token_accuracy"),
    "image-text": ("loss", "perplexity", "token_accuracy"),
    "classification": ("loss", "accuracy", "Matthews", "F1"),
    "image-classification": ("loss", "accuracy", "Matthews", "F1"),
    "regression": ("loss", "Pearson", "Spearman"),
}


class DivergedError(WeftError):
    """The loss became infinite or NaN."""


def loss_for(kind: str, smoothing: float = 0.0) -> Callable[..., Tensor]:
    """Returns the trainer's `compute_loss_func`, which returns a loss [].

    The loss is a sum over tokens (or rows) divided by `num_items_in_batch`. That counts the tokens
    of all micro-batches of an optimiser step, so accumulation does not change the gradient.
    """
    if kind == "regression":

        def squares(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            """Returns the mean square error [] for logits [rows, 1] and labels [rows]."""
            total = mse_loss(outputs.logits.float().squeeze(-1), labels.float(), reduction="sum")
            return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

        return squares

    def entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Returns the mean cross-entropy [] for logits [..., classes] and labels [...]."""
        return mean_entropy(outputs.logits, labels, smoothing, num_items_in_batch)

    return entropy


def mean_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, count: Any = None
) -> Tensor:
    """Returns the mean cross-entropy, computed in float32: the sum divided by `count`, or by the
    number of labels in the loss if that is None.

    logits [n, classes] with labels [n], or logits [n, length, words] (or those of the tokens in the
    loss alone, see `scored.answering`) with labels [n, length].
    """
    if labels.ndim == 1:
        wanted = labels
    else:
        inside, wanted = next_tokens(labels)
        logits = at(logits, inside)
    total = cross_entropy(logits.float(), wanted, reduction="sum", label_smoothing=smoothing)
    return total / ((wanted != IGNORED).sum() if count is None else count)


@torch.no_grad()
def reduced(logits: Any, labels: Tensor) -> Tensor:
    """Reduces a language model's logits [rows, length, words] to the inputs of its metrics [rows,
    3]: the summed loss, the number of tokens in it, and how many of them had the highest logit.

    labels [rows, length]. The logits may be those of the tokens in the loss alone.
    """
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    inside, wanted = next_tokens(labels)
    logits = at(logits, inside).float()
    each = cross_entropy(logits, wanted, reduction="none").double()
    hits = (logits.argmax(-1) == wanted).double()
    values = torch.stack([each, torch.ones_like(each), hits], dim=1)
    row = inside.nonzero()[:, 0]
    return values.new_zeros(len(labels), 3).index_add_(0, row, values)


def first(logits: Any, labels: Tensor) -> Any:
    """Returns the logits [n, classes] alone, if the model returns more. labels [n]."""
    return logits[0] if isinstance(logits, tuple | list) else logits


def metrics_for(kind: str) -> Callable[[Any], dict[str, float]]:
    """Returns the trainer's `compute_metrics`: exact means over all tokens or rows of the
    evaluation data, without smoothing.
    """

    def causal(found: Any) -> dict[str, float]:
        total, count, hits = (float(x) for x in found.predictions.sum(axis=0))
        loss = total / count
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": hits / count,
        }

    def classes(found: Any) -> dict[str, float]:
        logits, labels = (
            torch.as_tensor(found.predictions).float(),
            torch.as_tensor(found.label_ids).long(),
        )
        names = ["accuracy", "Matthews", *(["F1"] if logits.shape[1] == 2 else [])]
        return {
            "loss": float(cross_entropy(logits, labels)),
            **metric_values(names, logits.argmax(1), labels),
        }

    def numbers(found: Any) -> dict[str, float]:
        predicted, wanted = (
            torch.as_tensor(t).double().reshape(-1) for t in (found.predictions, found.label_ids)
        )
        return {
            "loss": float(mse_loss(predicted, wanted)),
            **metric_values(["Pearson", "Spearman"], predicted, wanted),
        }

    return {
        "causal-lm": causal,
        "image-text": causal,
        "classification": classes,
        "image-classification": classes,
        "regression": numbers,
    }[kind]


def metric_values(names: Sequence[str], predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Returns these metrics of `tasks.metrics`, predicted [n] and labels [n]. The correlation with
    numbers that are all equal is NaN.
    """
    found = {name: METRIC_FUNCTIONS[name](predicted.tolist(), labels.tolist()) for name in names}
    return {name: math.nan if value is None else value for name, value in found.items()}
