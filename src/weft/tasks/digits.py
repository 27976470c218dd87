"""`digits`: scikit-learn's handwritten digits 5 to 9, for a transformer that was trained on 0 to 4
only.

1,797 grey images of 8 x 8 pixels with values 0 to 16 (the test half of UCI's "Optical Recognition
of Handwritten Digits"). They are part of scikit-learn, so nothing is downloaded.
`scripts/pretrain_digits.py` trained the transformer on the images of 0 to 4 only. There are only 20
training images per new digit: with more, all methods have the same score.
"""

from __future__ import annotations

import random

import numpy as np
from PIL import Image

from ..errors import WeftError
from .base import SPLIT_SEED, SPLITS, Split, Task

OLD, NEW = range(5), range(5, 10)
TRAIN, VALIDATION = 20, 60  # images per digit; the others, about 100 per digit, are for testing


def load_digits() -> Task:
    """Loads the digits 5 to 9: 100 images for training, 300 for validation, 496 for testing."""
    images, labels = digit_images(NEW)
    parts: dict[str, list[int]] = {name: [] for name in SPLITS}
    for digit in NEW:
        rows = [i for i, label in enumerate(labels) if label == digit]
        random.Random(f"{SPLIT_SEED}/{digit}").shuffle(rows)
        parts["train"] += rows[:TRAIN]
        parts["validation"] += rows[TRAIN : TRAIN + VALIDATION]
        parts["test"] += rows[TRAIN + VALIDATION :]
    whole = Split(images, [label - NEW.start for label in labels])
    return Task(
        "digits",
        "image",
        tuple(str(d) for d in NEW),
        {k: whole.take(sorted(v)) for k, v in parts.items()},
    )


def digit_images(wanted: range) -> tuple[list[Image.Image], list[int]]:
    """Returns 8 x 8 grey images [n, 8, 8] (0 to 255) and their digits [n], in scikit-learn's order.

    Raises WeftError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise WeftError(
            "the task 'digits' needs scikit-learn: pip install 'weft[train]'."
        ) from None
    data = load_digits()
    rows = [i for i, digit in enumerate(data.target) if int(digit) in wanted]
    scaled = np.rint(data.images * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(scaled[i]) for i in rows], [int(data.target[i]) for i in rows]
