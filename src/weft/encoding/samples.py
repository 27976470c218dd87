"""Samples of one format, and the splits of a labelled task as such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..tasks import GENERATION, IMAGES, Task, find_generation, find_task
from ..tasks.files import Row


@dataclass(frozen=True)
class Samples:
    """Rows of one format, with Weft's column names.

    `format` is "prompt", "messages", "text" or "label". `source` names the samples in messages.
    `numbers` are those of the rows in the source, None if these are all of them.
    """

    format: str
    rows: list[Row]
    source: str
    numbers: list[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Sequence[int]) -> Samples:
        """Returns the samples with these row numbers."""
        numbers = self.numbers or range(1, len(self) + 1)
        return Samples(
            self.format, [self.rows[i] for i in rows], self.source, [numbers[i] for i in rows]
        )

    def name_of(self, index: int) -> str:
        """Returns the name of a row in messages: "data.jsonl, sample 3"."""
        return f"{self.source}, sample {self.numbers[index] if self.numbers else index + 1}"


def label_samples(task: Task, split: str) -> Samples:
    """Returns a split of a labelled text task."""
    chosen = task.splits[split]
    return Samples(
        "label",
        [
            {
                "texts": tuple(text) if isinstance(text, tuple | list) else (text,),
                "label": task.classes[int(label)] if task.classes else label,
            }
            for text, label in zip(chosen.items, chosen.labels, strict=True)
        ],
        task.name,
    )


def check_task(name: str) -> None:
    """Raises ConfigError if no task has this name or its files are missing."""
    if is_generation(name):
        find_generation(name)
    else:
        find_task(name)


def is_image(name: str) -> bool:
    """Whether the samples of the task with this name are images."""
    return name.partition(":")[0] in (*IMAGES, "image-folder", "digits")


def is_generation(name: str) -> bool:
    """Whether the answers of the task with this name are text."""
    return name.partition(":")[0] in {family.partition(":")[0] for family in GENERATION}
