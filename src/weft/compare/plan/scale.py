"""How scores are written: the metric's name, its unit, and which score is better."""

from __future__ import annotations

from dataclasses import dataclass

# Hundredths of these metrics are named by the metric alone; others are percentages.
_POINTS = ("BLEU", "ROUGE", "CIDEr")
_SHORT = {"logical-form accuracy": "form accuracy"}  # for narrow columns


@dataclass(frozen=True)
class Scale:
    """The scale of one split. Scores are fractions of 1, shown times 100. If `lowest`, the score is
    a loss, shown as it is, and the lowest is best.
    """

    metric: str = "accuracy"
    lowest: bool = False

    @property
    def factor(self) -> float:
        """Returns the number by which a score is multiplied for display."""
        return 1.0 if self.lowest else 100.0

    @property
    def unit(self) -> str:
        """The suffix of a number: " %" or nothing."""
        return "" if self.lowest or self.metric.startswith(_POINTS) else " %"

    @property
    def label(self) -> str:
        """The header of a column: "accuracy %", "BLEU", "loss"."""
        return _SHORT.get(self.metric, self.metric) + self.unit

    def number(self, value: float | None) -> str:
        """Returns the score in the unit of `label`."""
        if value is None:
            return "-"
        return f"{value:.3f}" if self.lowest else f"{100 * value:.1f}"

    def with_metric(self, value: float) -> str:
        """Returns the score with its unit or metric: "88.0 %", "BLEU 31.2", "loss 2.310"."""
        return f"{self.number(value)} %" if self.unit else f"{self.metric} {self.number(value)}"


ACCURACY = Scale()
