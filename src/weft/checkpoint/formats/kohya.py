"""LoRA and LyCORIS files of kohya's scripts: <module>.lora_down.weight is A, lora_up.weight is B,
and <module> a name without dots, "lora_unet_mid_block_attentions_0_proj_in".

lora_down [r, in, *size]    lora_up [out, r, 1, ...]    alpha []      on a linear layer [r, in] and [out, r]
lora_mid [r, r, *size]      a kernel after a lora_down of one place; together they are one kernel
dora_scale [out, 1, ...]    LyCORIS' magnitudes since April 2025; before, [1, in, ...] were another method

Without an alpha it is the rank, as in kohya's scripts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from ...errors import UnsupportedError
from ..checkpoint import Checkpoint
from ..naming import FLAT, Naming
from . import loose

_PARTS = {
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
}
_NAME = re.compile(rf"({'|'.join(FLAT)})[^.]+\..+")
# Endings of the tensors of LyCORIS' other methods.
_OTHERS = {
    r"hada_\w+": "LoHa",
    r"lokr_\w+": "LoKr",
    r"oft_\w+": "OFT",
    r"on_input": "IA3",
    r"(a|b|bm)[12]\.weight": "GLoRA",
    r"(w|b)_norm": "trained norms",
    r"diff(_b)?": "weights trained in full",
    r"scalar": "LoCon with a trained scalar that was not folded in",
}


class KohyaFormat:
    """See the module's text."""

    name = "kohya"

    def recognises(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        return bool(keys) and all(_NAME.fullmatch(key) for key in keys)

    def read(self, metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> Checkpoint:
        """Reads A, B and, of LyCORIS, m of every layer.

        Raises UnsupportedError for tensors of other methods of LyCORIS, by their names.
        """
        for key in tensors:
            ending = key.partition(".")[2]
            other = next((what for e, what in _OTHERS.items() if re.fullmatch(e, ending)), None)
            if other is not None:
                raise UnsupportedError(
                    f"{key!r} is of LyCORIS' {other}; of such files Weft reads LoRA (LoCon) and DoRA. Merge "
                    "it with LyCORIS."
                )
        layers, left = loose.split(tensors, _PARTS)
        checkpoint = loose.read(self.name, tensors, layers, Naming(flat=True))
        checkpoint.problems += [f"extra: {key!r} is no tensor of a LoRA of kohya" for key in left]
        return checkpoint
