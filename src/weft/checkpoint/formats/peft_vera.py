"""VeRA in peft's format: the vectors of each layer, and A and B once.

base_model.model.<module>.vera_lambda_b [out]   vera_lambda_d [r]   base_model.vera_A [r, in]   base_model.vera_B [out, r]

Without the matrices peft would draw others from the seed than Weft does, so they are always
written. Weft's own format is smaller and comes first in FORMATS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...methods import VeRA
from ..checkpoint import Checkpoint, CheckpointLayer, Written
from ..problems import take
from . import peft_bias as bias
from . import peft_experts, peft_tokens
from . import peft_layers as layers

_NAMES = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
_PARTS = {name: tensor for tensor, name in _NAMES.items()}
_key_of = layers.keys_of(_NAMES)
_KEY = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(_PARTS)})(\.[^.]+)?")
_MATRIX = re.compile(r"((module|_orig_mod)\.)*base_model\.vera_(?P<which>[AB])(\.[^.]+)?")
_A, _B = "base_model.vera_A", "base_model.vera_B"
_SUPPORTED = {
    "r": int,
    "projection_prng_key": int,
    "save_projection": bool | None,
    "vera_dropout": float | None,
    "d_initial": float,
    "init_weights": Any,
}


class VeraFormat:
    """See the module's text."""

    name = "VERA"
    methods = (VeRA,)
    peft_reads_it = True
    stores_projections = True

    def why_not(self, checkpoint: Checkpoint, model: nn.Module | None = None) -> str | None:
        config: Any = checkpoint.config
        why = peft_experts.why_not(checkpoint)
        if why is not None:
            return why
        for name, layer in checkpoint.sites.items():
            if layer.kind == "embedding":
                return f"peft has no form for the embedding {name!r}"
            if layer.kind == "convolution":
                return f"peft's VeRA has no form for the convolution {name!r}"
            if layer.kind == "weight":
                return f"peft has no form for {name!r}, which its module reads itself"
            for field in ("r", "seed", "draw"):
                value = getattr(layer.rule, field)
                if value != getattr(config, field):
                    return (
                        f"peft has one {field} for all layers, and {name!r} has {field}={value!r}"
                    )
        if checkpoint.projections is None:
            return "peft needs A and B in the file"
        return bias.why_none(checkpoint) or peft_tokens.why_none(checkpoint)

    def write(self, checkpoint: Checkpoint, model: nn.Module | None = None) -> Written:
        assert checkpoint.projections is not None
        A, B = checkpoint.projections
        written = layers.write_layers(checkpoint, model, _key_of, _vera_fields(checkpoint.config))
        return written._replace(tensors={**written.tensors, _A: A, _B: B})

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == self.name

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
        """Reads d [r] and b [out] of every layer, and A [r, in] and B [out, r] if the file has
        them.

        Raises UnsupportedError if a field of peft is not supported, and ConfigError if a value is
        invalid.
        """
        layers.refuse_fields(config, _SUPPORTED, "VeRA")
        has_matrices = any(map(_MATRIX.fullmatch, tensors))
        built = VeRA(
            r=config.get("r", 256),
            d_init=float(config.get("d_initial", 0.1)),
            dropout=float(config.get("vera_dropout") or 0.0),
            seed=config.get("projection_prng_key", 0),
            draw="stored" if has_matrices else "peft",
            targets=layers.targets_of(config),
            modules_to_save=config.get("modules_to_save") or (),
            dtype=layers.dtype_of(tensors),
        )
        checkpoint = Checkpoint(built, "peft", self.name)
        first = sorted(tensors)[:3]
        if has_matrices or config.get("save_projection", True):
            tensors = dict(tensors)
            _take_matrices(checkpoint, tensors)
        rest = layers.bare_keys(checkpoint, tensors)

        def layer_of(module: str, part: str) -> CheckpointLayer:
            return CheckpointLayer(built, kind="linear")

        layers.read_layers(checkpoint, rest, _KEY, _PARTS, _key_of, layer_of)
        return layers.finish_reading(checkpoint, rest, config, first)

    def restore(
        self, checkpoint: Checkpoint, tensors: dict[str, Tensor], manifest: Mapping[str, Any]
    ) -> None:
        """Fills d [r] and b [out] of every layer, and the shared A [r, in] and B [out, r]."""
        matrices = [name for name in manifest["keys"] if _MATRIX.fullmatch(name)]
        _take_matrices(checkpoint, tensors)
        layers.restore_layers(checkpoint, tensors, manifest, _key_of, matrices)

    def why_not_model(self, root: nn.Module) -> str | None:
        return None


def _vera_fields(config: Any) -> dict[str, Any]:
    return {
        "peft_type": VeraFormat.name,
        "r": config.r,
        "projection_prng_key": config.seed,
        "save_projection": True,
        "vera_dropout": config.dropout,
        "d_initial": config.d_init,
    }


def _take_matrices(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Moves A and B out of the tensors."""
    spelled = {m["which"]: name for name in tensors if (m := _MATRIX.fullmatch(name))}
    A, B = (
        take(tensors, spelled.get(which, key), None, f"VeRA's {which}", checkpoint.problems)
        for which, key in (("A", _A), ("B", _B))
    )
    if A is not None and B is not None:
        checkpoint.projections = A.float(), B.float()
