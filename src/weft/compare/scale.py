"""How scores are written down: their metric's name, their unit, and which of them is better."""

from __future__ import annotations

from dataclasses import dataclass

_POINTS = (
    "BLEU",
    "ROUGE",
)  # hundredths of them are called by the metric's own name; others are percentages
_SHORT = {"logical-form accuracy": "form accuracy"}  # where there is little room


@dataclass(frozen=True)
class Scale:
    """Of one split. Scores are fractions of 1 and shown times 100; a loss is shown as it is, and
    the `lowest` is best.
    """

    metric: str = "accuracy"
    lowest: bool = False

    @property
    def factor(self) -> float:
        return 1.0 if self.lowest else 100.0

    @property
    def unit(self) -> str:
        """Behind a number: " %", or nothing."""
        return "" if self.lowest or self.metric.startswith(_POINTS) else " %"

    @property
    def label(self) -> str:
        """Head of a column: "accuracy %", "BLEU", "loss"."""
        return _SHORT.get(self.metric, self.metric) + self.unit

    def number(self, value: float | None) -> str:
        """In the unit of `label`."""
        if value is None:
            return "-"
        return f"{value:.3f}" if self.lowest else f"{100 * value:.1f}"

    def told(self, value: float) -> str:
        """With the metric where it is not a percentage: "88.0 %", "BLEU 31.2", "loss 2.310"."""
        return f"{self.number(value)} %" if self.unit else f"{self.metric} {self.number(value)}"


ACCURACY = Scale()
