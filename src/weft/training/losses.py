"""What is minimised and what is measured, for each kind of model: defined here and not left to the
model's class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from ..tasks.metrics import METRICS as METRIC_FUNCTIONS
from .render import IGNORED

LOWER_IS_BETTER = ("loss", "perplexity")
METRICS = {
    "causal-lm": ("loss", "perplexity", "token_accuracy"),
    "classification": ("loss", "accuracy", "Matthews", "F1"),
    "image-classification": ("loss", "accuracy", "Matthews", "F1"),
    "regression": ("loss", "Pearson", "Spearman"),
}


def loss_for(kind: str, smoothing: float = 0.0) -> Callable[..., Tensor]:
    """`compute_loss_func` of the trainer: the sum over the samples' tokens (or rows) divided by
    `num_items_in_batch`, which counts those of all micro-batches of an optimiser step, so that
    accumulation changes nothing.
    """
    if kind == "regression":

        def squares(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            total = mse_loss(outputs.logits.float().squeeze(-1), labels.float(), reduction="sum")
            return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

        return squares

    def entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return mean_entropy(outputs.logits, labels, smoothing, num_items_in_batch)

    return entropy


def mean_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, count: Any = None
) -> Tensor:
    """Cross-entropy of classes [n] or tokens [n, length], summed in float32 and divided by `count`;
    None: by those in it.
    """
    logits, wanted = _aligned(logits, labels)
    total = cross_entropy(
        logits.float(), wanted, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
    )
    return total / ((wanted != IGNORED).sum() if count is None else count)


def _aligned(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, classes] and labels [n]; of a language model, position i predicts token i + 1."""
    if labels.ndim == 1:
        return logits, labels
    return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


@torch.no_grad()
def reduced(logits: Any, labels: Tensor) -> Tensor:
    """What is kept of a language model's logits for its metrics: [rows, 3] with the summed loss,
    the tokens in it, and how many of them were the most likely one.
    """
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    wanted, logits = labels[:, 1:], logits[:, :-1].float()
    inside = wanted != IGNORED
    each = cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(wanted.shape)
    hits = (logits.argmax(-1) == wanted) & inside
    return torch.stack([each.double().sum(1), inside.double().sum(1), hits.double().sum(1)], dim=1)


def first(logits: Any, labels: Tensor) -> Any:
    """The logits alone, where a model returns more."""
    return logits[0] if isinstance(logits, tuple | list) else logits


def metrics_for(kind: str) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics` of the trainer: exact means over all tokens or rows of the evaluation data,
    without smoothing.
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
            **_scores(names, logits.argmax(1), labels),
        }

    def numbers(found: Any) -> dict[str, float]:
        said, wanted = (
            torch.as_tensor(t).double().reshape(-1) for t in (found.predictions, found.label_ids)
        )
        return {
            "loss": float(mse_loss(said, wanted)),
            **_scores(["Pearson", "Spearman"], said, wanted),
        }

    return {
        "causal-lm": causal,
        "classification": classes,
        "image-classification": classes,
        "regression": numbers,
    }[kind]


def _scores(names: Sequence[str], predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Metrics of `tasks.metrics`; a correlation with numbers that are all equal is NaN."""
    found = {name: METRIC_FUNCTIONS[name](predicted.tolist(), labels.tolist()) for name in names}
    return {name: math.nan if value is None else value for name, value in found.items()}


def collate(rows: list[dict[str, Any]], pad: int) -> dict[str, Tensor]:
    """A batch padded on the right to its longest row: input_ids, attention_mask, labels (and
    token_type_ids); of images pixel_values and labels.
    """
    if "pixel_values" in rows[0]:
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> Tensor:
        return torch.tensor([[*row[key], *[fill] * (longest - len(row[key]))] for row in rows])

    batch = {
        "input_ids": padded("input_ids", pad),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        ),
    }
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = padded("token_type_ids", 0)
    per_token = not isinstance(rows[0]["labels"], int | float)
    batch["labels"] = (
        padded("labels", IGNORED) if per_token else torch.tensor([row["labels"] for row in rows])
    )
    return batch
