"""What a merge measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Largest relative change of the output that a merge may cause, by the dtype of the merged weights.
# A merge rounds W' once; what a deep model makes of that rounding is some ten to a hundred units in
# the last place.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class MergeReport:
    """The measurements of a merge.

    rounding: largest ‖cast(W') - W'‖ / ‖W'‖ over the merged weights. change: largest ‖W' - W‖ /
    ‖W‖. With `verify`: output_error is max |merged - attached| / max |attached| over all outputs,
    effect is the same for attached against base, and tolerance is the limit of output_error. Over a
    quantised base: packed is the number of packed layers among the weights and formats their names;
    dtype is that of the dense layers that they have become, or None if W' was packed again, and then
    survived is the share of the adapter's change that is left, in [0.5, 1].
    """

    name: str
    weights: int
    rounding: float
    change: float
    output_error: float | None = None
    effect: float | None = None
    tolerance: float | None = None
    packed: int = 0
    formats: str = ""
    dtype: torch.dtype | None = None
    survived: float | None = None

    def __str__(self) -> str:
        text = (
            f"merged {self.name!r} into {self.weights} weights: changed by up to "
            f"{self.change:.2e}, rounded by "
            f"{self.rounding:.1e} (relative)"
        )
        if self.survived is not None:
            text += (
                f"; {self.packed} of them were packed again ({self.formats}), of the change "
                f"{100 * self.survived:.3g} % survived"
            )
        elif self.packed:
            text += (
                f"; {self.packed} of them were packed ({self.formats}) and are dense now, in "
                f"{str(self.dtype).removeprefix('torch.')}"
            )
        if self.output_error is None:
            return text + "; outputs not verified"
        return (
            text
            + f"; outputs differ by {self.output_error:.1e} (allowed {self.tolerance:.0e}), while "
            "the adapter "
            f"moves them by {self.effect:.1e}"
        )
