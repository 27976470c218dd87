"""LoRA and DoRA in files without adapter_config.json, as tools for diffusion models write them:
every layer has tensors of its own, whose shapes say its rank, and often an alpha.

They are read as peft's LoRA, once the tensors have the names and shapes that they would have there.
The files do not say how the module is called in a model, or only in part; naming.py finds out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, UnsupportedError
from ..checkpoint import Checkpoint
from ..naming import Naming
from .peft_layers import PREFIX
from .peft_lora import LoraFormat

A, B, M = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_NAMES = {"A": A, "B": B, "m": M}


@dataclass
class Layer:
    """The keys of one layer in the file, by what they hold: A, B, mid, alpha, m (as peft shapes it)
    or dora_scale.
    """

    keys: dict[str, str] = field(default_factory=dict)


def split(
    tensors: Mapping[str, Tensor], parts: Mapping[str, str]
) -> tuple[dict[str, Layer], list[str]]:
    """Returns the layers by the file's module names, and the keys that belong to none. `parts`:
    endings of keys, and what such a tensor holds.
    """
    layers: dict[str, Layer] = {}
    left = []
    for key in tensors:
        ending = next((e for e in parts if key.endswith(e) and len(key) > len(e)), None)
        if ending is None:
            left.append(key)
            continue
        own = layers.setdefault(key.removesuffix(ending), Layer()).keys
        if parts[ending] in own:
            raise CheckpointError(
                f"{own[parts[ending]]!r} and {key!r} are one tensor of one layer."
            )
        own[parts[ending]] = key
    return layers, left


def read(
    writer: str,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Layer],
    naming: Naming,
    config: Mapping[str, Any] | None = None,
    alpha_of: Callable[[str], float | None] = lambda module: None,
) -> Checkpoint:
    """Returns the checkpoint of these layers. `config`: further fields of peft's LoRA. `alpha_of`
    says the alpha of a module whose layer has none; by default it is the layer's rank.

    Raises UnsupportedError for magnitudes per input, and the errors of `LoraFormat.read`.
    """
    as_peft = _AsPeft()
    for module, layer in layers.items():
        as_peft.add(module, layer, tensors, alpha_of(module))
    found = LoraFormat().read({**as_peft.fields(), **(config or {})}, as_peft.tensors)
    found.problems = as_peft.problems + [as_peft.in_words_of_the_file(p) for p in found.problems]
    for each in found.sites.values():
        each.keys = {t: as_peft.original.get(key, key) for t, key in each.keys.items()}
    found.writer, found.format, found.peft_reads_it = writer, writer, False
    found.naming = naming
    if any("mid" in layer.keys for layer in layers.values()):
        found.notes.append(
            "the kernels of lora_mid were multiplied into A, which changes no output"
        )
    return found


class _AsPeft:
    """Layers under the names and shapes of peft; `original` has the file's keys by peft's."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        self.original: dict[str, str] = {}
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}

    def add(
        self, module: str, layer: Layer, tensors: Mapping[str, Tensor], alpha: float | None
    ) -> None:
        """Adds a layer, or a problem if it has no A [r, in, ...] or no B [out, r, ...]."""
        lacking = [part for part in ("A", "B") if part not in layer.keys]
        if lacking:
            have = next(iter(layer.keys.values()))
            self.problems.append(f"missing: {have!r} has no {' and no '.join(lacking)} beside it")
            return
        own = {part: tensors[key] for part, key in layer.keys.items()}
        rank = self.ranks[module] = max(1, own["B"].shape[1] if own["B"].ndim > 1 else 1)
        self.alphas[module] = _alpha(layer, own, rank, alpha)
        if "mid" in own:
            own["A"] = _joined(layer, own)
        if "dora_scale" in own:
            own["m"] = _magnitude(module, own)
        for part, name in _NAMES.items():
            if part in own:
                key = f"{PREFIX}{module}.{name}"
                self.tensors[key] = own[part]
                self.original[key] = layer.keys.get(part) or layer.keys["dora_scale"]

    def fields(self) -> dict[str, Any]:
        """peft's configuration. Raises CheckpointError if there is no layer."""
        if not self.ranks:
            raise CheckpointError("; ".join(self.problems) or "it holds no tensor of a LoRA.")
        r = Counter(self.ranks.values()).most_common(1)[0][0]
        alpha = Counter(self.alphas.values()).most_common(1)[0][0]
        return {
            "peft_type": LoraFormat.name,
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": {f"^{re.escape(m)}": n for m, n in self.ranks.items() if n != r},
            "alpha_pattern": {f"^{re.escape(m)}": a for m, a in self.alphas.items() if a != alpha},
            "use_dora": any(key.endswith(M) for key in self.tensors),
            "init_lora_weights": True,
        }

    def in_words_of_the_file(self, problem: str) -> str:
        for key, name in self.original.items():
            problem = problem.replace(repr(key), repr(name))
            problem = problem.replace(repr(key.removeprefix(PREFIX)), repr(name))
        return problem


def _alpha(layer: Layer, own: Mapping[str, Tensor], r: int, known: float | None) -> float:
    if "alpha" not in own:
        return float(r) if known is None else known
    t = own["alpha"]
    if t.numel() != 1 or not bool(torch.isfinite(t.double()).all()) or float(t) <= 0:
        raise CheckpointError(f"{layer.keys['alpha']!r}: an alpha is one number above 0.")
    return float(t)


def _joined(layer: Layer, own: Mapping[str, Tensor]) -> Tensor:
    """The kernel [r, in, *size] of mid [r, r', *size] after A [r', in, 1, ...]."""
    mid, A = own["mid"], own["A"]
    fits = mid.ndim == A.ndim > 2 and mid.shape[1] == A.shape[0] and A[0, 0].numel() == 1
    if not fits:
        raise CheckpointError(
            f"{layer.keys['mid']!r} {list(mid.shape)} does not follow {layer.keys['A']!r} {list(A.shape)}."
        )
    found = torch.einsum("rj...,ji->ri...", mid.double(), A.double().flatten(1))
    return found.to(torch.promote_types(mid.dtype, torch.float32))


def _magnitude(module: str, own: Mapping[str, Tensor]) -> Tensor:
    """m as peft shapes it, of LyCORIS' dora_scale [out, 1, ...]."""
    scale, out = own["dora_scale"], own["B"].shape[0]
    ones = (1,) * (own["A"].ndim - 1)
    if tuple(scale.shape) == (out, *ones):
        return scale.reshape(1, out, *ones[1:]) if len(ones) > 1 else scale.reshape(out)
    if scale.ndim == len(ones) + 1 and scale.shape[0] == 1:
        raise UnsupportedError(
            f"{module!r} has a dora_scale {list(scale.shape)}, one magnitude per input channel, as LyCORIS "
            "wrote before April 2025 (wd_on_out=False). That is another method than DoRA, whose "
            f"magnitudes [{out}, 1, ...] belong to the outputs. Merge it with LyCORIS."
        )
    raise CheckpointError(
        f"the dora_scale of {module!r} has the shape {list(scale.shape)}; {[out, *ones]} is expected."
    )
