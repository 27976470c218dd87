"""The closed form of every method in the papers: its number of trained parameters, from sizes
alone.

`weft papers` counts attached methods instead; the tests check that both are equal. An adapted
matrix is (out, in). L blocks have width d and an MLP of width f. The forms of Full, BitFit and
TopLayers are those of a GPT-2 with a tied head: V tokens, c positions, biases everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model and of the targets."""

    maps: tuple[tuple[int, int], ...] = ()
    layers: int = 0
    width: int = 0
    inner: int = 0
    vocabulary: int = 0
    positions: int = 0
    classes: int = 0

    @property
    def block(self) -> int:
        """Parameters of one block: four matrices d x d, two d x f, their biases, two LayerNorms."""
        return 4 * self.width**2 + 2 * self.width * self.inner + 9 * self.width + self.inner


@dataclass(frozen=True)
class Form:
    """`text` describes `count(config, sizes)`."""

    text: str
    count: Callable[[Any, Sizes], int]


def _adapters(config: Any, sizes: Sizes) -> int:
    """Bottleneck: each adapter is d -> r -> d; four of the presets have biases."""
    r, d, f, layers = config.r, sizes.width, sizes.inner, sizes.layers
    plain = 2 * d * r
    biased = plain + r + d
    dropped = getattr(config, "skip_layers", 0)
    # By name: the listed layers, instead of the MLP's output.
    named = isinstance(getattr(config, "targets", None), list)
    parallel = sum(r * (i + o) for o, i in sizes.maps) if named else layers * r * (d + f)
    counts: dict[str, int] = {
        "houlsby": 2 * layers * biased,
        "lin": layers * (biased + 2 * d),
        "pfeiffer": layers * biased,
        "drop": (layers - dropped) * biased,
        "series": layers * plain,
        "parallel": parallel,
    }
    return counts[config.preset]


FORMS: dict[str, Form] = {
    "Full": Form(
        "V d + c d + L (4 d^2 + 2 d f + 9 d + f) + 2 d",
        lambda c, s: (s.vocabulary + s.positions) * s.width + s.layers * s.block + 2 * s.width,
    ),
    "TopLayers": Form(
        "k (4 d^2 + 2 d f + 9 d + f) + 2 d", lambda c, s: c.k * s.block + 2 * s.width
    ),
    "Head": Form("d C + C for C classes", lambda c, s: s.width * s.classes + s.classes),
    "BitFit": Form("L (7 d + f) + d", lambda c, s: s.layers * (7 * s.width + s.inner) + s.width),
    "LoRA": Form("sum of r (in + out)", lambda c, s: sum(c.r * (i + o) for o, i in s.maps)),
    "DyLoRA": Form(
        "sum of r (in + out), r the largest rank",
        lambda c, s: sum(c.r * (i + o) for o, i in s.maps),
    ),
    "AdaLoRA": Form(
        "sum of r (in + out + 1)", lambda c, s: sum(c.r * (i + o + 1) for o, i in s.maps)
    ),
    "LoRAFA": Form("sum of r out", lambda c, s: sum(c.r * o for o, _ in s.maps)),
    "VeRA": Form("sum of (out + r)", lambda c, s: sum(o + c.r for o, _ in s.maps)),
    "DoRA": Form(
        "sum of r (in + out) + out", lambda c, s: sum(c.r * (i + o) + o for o, i in s.maps)
    ),
    "DVoRA": Form("sum of (2 out + r)", lambda c, s: sum(2 * o + c.r for o, _ in s.maps)),
    "Bottleneck": Form(
        "houlsby 2 L (2 d r + r + d); lin L (2 d r + r + d) + 2 L d; pfeiffer L (2 d r + r + d); "
        "drop (L - skipped) (2 d r + r + d); series 2 L d r; parallel r (in + out) per layer",
        _adapters,
    ),
    "Prefix": Form("2 L d n", lambda c, s: 2 * s.layers * s.width * c.n),
    "PreEmbed": Form("d (l_p + l_i)", lambda c, s: s.width * (c.l_p + c.l_i)),
    "PreLayer": Form("L d (l_p + l_i)", lambda c, s: s.layers * s.width * (c.l_p + c.l_i)),
}
