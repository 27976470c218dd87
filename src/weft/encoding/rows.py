"""Encoded samples, and counts of the problems in encoding them."""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import dataclass, field
from typing import Any

from ..errors import WeftError

IGNORED = -100  # the label of a token that is not in the loss
TOO_LONG = "Raise data.max_length, or use --preview to see what is masked."


@dataclass
class Counts:
    """How many samples have which problem."""

    samples: int = 0
    cut: int = 0  # longer than max_length
    end_cut: int = 0
    end_masked: int = 0
    end_missing: int = 0
    empty: int = 0
    excluded: int = 0  # by the records' own weight or train
    blank: int = 0
    unmarked: int = 0
    unknown: int = 0
    control: int = 0

    def notes(self, what: str, limit: str = "data.max_length") -> list[str]:
        """Returns one line per problem that occurred."""
        problems = (
            (self.cut, f"longer than {limit} and cut off"),
            (
                self.end_cut,
                "whose end-of-turn token was cut off: they do not teach the model to stop",
            ),
            (
                self.end_masked,
                "whose end-of-turn token is not in the loss: they do not teach the model to stop",
            ),
            (
                self.end_missing,
                "with a turn that no special token closes: they do not teach the model to stop",
            ),
            (self.empty, "with no token in the loss, left out"),
            (self.blank, "with an answer that is empty or blank: they teach to say nothing"),
            (
                self.unmarked,
                "with an answer that the template's {% generation %} block leaves out of the loss",
            ),
            (
                self.unknown,
                "with characters that the tokenizer does not know: the model sees an unknown token",
            ),
            (
                self.control,
                "with a message whose text has a special token: the model reads it as that token",
            ),
        )
        return [f"{what}: {n} of {self.samples} samples {text}." for n, text in problems if n]

    def check(self, what: str, cure: str = TOO_LONG) -> None:
        """Raises WeftError if no sample is usable. `cure` is the advice for samples that are too
        long.
        """
        if self.empty >= self.samples:
            if self.excluded:
                cure = (
                    f"{self.excluded} of them take all turns of the assistant out of it themselves, "
                    "with weight: 0 or train: false. Change these keys, or leave them out with "
                    "data.ignore: [messages.weight], or [messages.train]."
                )
            raise WeftError(
                f"{what}: none of the {self.samples} samples has a token in the loss. {cure}"
            )
        if self.end_cut + self.end_masked + self.end_missing >= self.samples:
            if self.end_cut < self.end_masked + self.end_missing:
                cure = (
                    "The chat template must close assistant turns with a special token, inside "
                    "{% generation %} if it has that block."
                )
            raise WeftError(
                f"{what}: in none of the {self.samples} samples the end-of-turn token is in the "
                f"loss ({self.end_cut} cut off, {self.end_masked} masked, {self.end_missing} without "
                f"one), so the model would not learn to stop. {cure}"
            )


@dataclass(frozen=True)
class EncodedRows:
    """Samples ready for `collate`: input_ids, labels (one per token, or one number), and
    token_type_ids if the model has them; remarks for the preview, if there are any; and the paths
    of images with digests of their files.

    Tokens are kept in arrays: a list of Python integers takes eight times the memory.
    """

    rows: list[dict[str, Any]]
    counts: Counts = field(default_factory=Counts)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def fingerprint(self) -> str:
        """Returns 16 hex digits over all tokens, labels and images, in order."""
        sha = hashlib.sha256()
        for row in self.rows:
            sha.update(
                json.dumps(
                    [
                        list(v) if isinstance(v, array) else v
                        for v in (row["input_ids"], row["labels"], *row.get("digests", ()))
                    ]
                ).encode()
            )
        return sha.hexdigest()[:16]
