"""Encoded samples to a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rows import IGNORED


def collate(rows: list[dict[str, Any]], pad: int) -> dict[str, Tensor]:
    """Returns a batch, padded on the right to its longest row.

    input_ids, attention_mask [rows, length], labels [rows, length] or [rows], and token_type_ids
    [rows, length] if the rows have them; for images pixel_values [rows, channels, height, width]
    and labels [rows].
    """
    if "pixel_values" in rows[0]:
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> Tensor:
        """Returns this field of all rows [batch, longest], padded on the right with `fill`."""
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
