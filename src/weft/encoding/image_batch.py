"""Rows with pictures to a batch. Pictures are opened here, so memory is that of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import WeftError
from .collate import collate
from .image_files import open_image
from .processor import Processor


class ImageCollator:
    """Makes a batch as `collate` does, with the model's inputs for the pictures of its rows, which
    may be none.
    """

    def __init__(self, processor: Processor, pad: int) -> None:
        self.processor, self.pad = processor, pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Raises WeftError if a picture cannot be read, or is not that of the row's tokens."""
        batch = collate(rows, self.pad)
        names = [name for row in rows for name in row.get("images", ())]
        images, wanted = self.processor.images([open_image(name) for name in names])
        have = sum(self.processor.count(row["input_ids"]) for row in rows)
        if have != wanted:
            raise WeftError(
                f"the images {', '.join(map(repr, names[:3]))}{' ...' * (len(names) > 3)} have "
                f"{wanted} tokens and the rows {have}: a file was changed after training began."
            )
        return {**batch, **self.processor.token_types(batch["input_ids"]), **images}


def prompt_inputs(
    processor: Processor, ids: list[int], pictures: list[Any], device: torch.device
) -> dict[str, Tensor]:
    """Returns the inputs of one prompt: input_ids and attention_mask [1, length], and those of its
    pictures.
    """
    row = torch.tensor([ids])
    images, _ = processor.images(pictures)
    inputs = {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        **processor.token_types(row),
        **images,
    }
    return {key: value.to(device) for key, value in inputs.items()}
