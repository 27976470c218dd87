"""LoRA on fused experts in peft's format (`target_parameters`, peft 0.19 and later).

    lora_A.weight [E·r, in]: expert by expert       lora_B.weight [out, r·E]: rank by rank, of all experts each

peft wraps a module once per parameter, in the order of the parameters, so the last one has the keys
of the module, <module>.lora_A.weight, the one before <module>.base_layer.lora_A.weight, and so on.
Of a module that stores [E, in, out] without saying so (Llama 4), peft's in and out are exchanged:
there its lora_A is B transposed, and its lora_B is A transposed.

For some families peft takes the names of linear layers for those of earlier, unfused experts, and
adapts the fused ones in their place (`misread`). No file can tell it otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...errors import ConfigError, UnsupportedError
from ...methods import stacked
from ...model.base_layers.experts import EXCHANGED, KIND
from ...model.structure import Structure
from ..checkpoint import Checkpoint, CheckpointLayer
from ..matching import bare
from ..problems import take

FIELD = "target_parameters"
_ORDER = ("gate_up_proj", "up_proj", "down_proj")  # of the parameters in every class of experts
# Model types whose layers of these names peft 0.21 takes for experts, if it runs with transformers 5.
_OF_MIXTRAL = ("mixtral", "minimax", "minimax_m2")
_OF_QWEN = (
    *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1"),
    *("ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe"),
    *("glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe", "qwen3_moe"),
    *("qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker"),
    *("sarvam_mla", "solar_open"),
)
_TAKEN = {
    **dict.fromkeys(_OF_MIXTRAL, ("gate", "w1", "w2", "w3")),
    **dict.fromkeys(_OF_QWEN, ("gate", "gate_proj", "up_proj", "down_proj")),
}
_KEY = re.compile(
    r"(?P<module>.+?)(?P<depth>(\.base_layer)*)\.lora_(?P<part>[AB])(\.[^.]+)?\.weight"
)


def is_stack(layer: CheckpointLayer) -> bool:
    """Whether a layer is a fused weight of experts."""
    return layer.kind in (KIND, EXCHANGED)


def why_not(checkpoint: Checkpoint, peft_adapts: bool = False) -> str | None:
    """Returns why peft has no form for the experts of a checkpoint, or None. `peft_adapts`: for the
    method, on experts.
    """
    found = next((name for name, x in checkpoint.sites.items() if is_stack(x)), None)
    if found is None:
        return None
    if not peft_adapts:
        return f"peft adapts fused experts ({found!r}) by LoRA only"
    if checkpoint.config.dropout:
        return f"peft takes no dropout if fused experts ({found!r}) are adapted"
    return None


def misread(checkpoint: Checkpoint, model: nn.Module | None) -> str | None:
    """Returns why peft would adapt other layers than those of the checkpoint, or None."""
    if model is None:
        kind = checkpoint.base.get("model_type")
    else:
        kind = getattr(getattr(bare(model), "config", None), "model_type", None)
    taken = _TAKEN.get(kind, ()) if isinstance(kind, str) else ()
    for name, layer in checkpoint.sites.items():
        if name.rpartition(".")[2] in taken and not is_stack(layer):
            return f"peft takes {name!r} of a {kind} for fused experts, and would adapt those"
    return None


def fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the fields of a configuration that name the experts."""
    names = [name for name, layer in checkpoint.sites.items() if is_stack(layer)]
    return {FIELD: names} if names else {}


def packed(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint with the tensors of experts as peft stores them."""
    sites = {
        name: replace(layer, tensors=_packed(layer)) if is_stack(layer) else layer
        for name, layer in checkpoint.sites.items()
    }
    return replace(checkpoint, sites=sites)


def key_of(checkpoint: Checkpoint, module: str, tensor: str) -> str:
    """Returns the key of a tensor of an expert weight, without peft's prefix."""
    holder, _, own = module.rpartition(".")
    there = [w for w in _ORDER if f"{holder}.{w}" in checkpoint.sites]
    depth = len(there) - 1 - there.index(own)
    return f"{holder}{'.base_layer' * depth}.lora_{tensor}.weight"


def restore(checkpoint: Checkpoint, tensors: dict[str, Tensor], prefix: str) -> list[str]:
    """Fills the expert weights from a file that Weft wrote. Returns the keys that were read."""
    taken = []
    for module, layer in checkpoint.sites.items():
        if not is_stack(layer):
            continue
        shapes = stacked.shapes(layer.rule, layer.known_shape())
        for name in ("A", "B"):
            key = prefix + key_of(checkpoint, module, name)
            layer.keys[name] = key
            taken.append(key)
        exchanged = layer.kind == EXCHANGED
        _fill(checkpoint, module, tensors, _disk_shapes(shapes, exchanged), exchanged)
    return taken


def read(
    checkpoint: Checkpoint,
    rest: dict[str, Tensor],
    config: Mapping[str, Any],
    rule_of: Any,
    prefix: str,
) -> None:
    """Moves the tensors of the parameters that a file of peft names out of `rest`. `rule_of(name)`
    returns a layer's method.

    Raises ConfigError or UnsupportedError for names that cannot be told apart.
    """
    names = names_of(config)
    found: dict[str, dict[int, dict[str, str]]] = {}
    for key in rest:
        match = _KEY.fullmatch(key)
        if match and _holds(match, names, rest, rule_of):
            depth = match["depth"].count(".")
            found.setdefault(match["module"], {}).setdefault(depth, {})[match["part"]] = key
    for module, levels in found.items():
        own = _own(module, names)
        if len(own) < len(levels) or not set(own) <= {*_ORDER, "weight"}:
            raise UnsupportedError(
                f"{FIELD}={list(names)}: the file has {len(levels)} parameters of {module!r}, and Weft "
                f"cannot tell which; it knows {list(_ORDER)}."
            )
        order = [w for w in (*_ORDER, "weight") if w in own]
        for depth, keys in levels.items():
            tensor = order[len(order) - 1 - depth]
            _read_one(checkpoint, rest, module, tensor, keys, rule_of, prefix)


def names_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of parameters that a configuration of peft has. Raises ConfigError."""
    names = config.get(FIELD) or ()
    if not isinstance(names, Sequence) or not all(isinstance(n, str) and n for n in names):
        raise ConfigError(f"{FIELD}: a list of names is expected.")
    return tuple(names)


def adapted_by(names: Sequence[str], structure: Structure) -> list[str]:
    """Returns the layers of a model that these names of parameters choose, by peft's rule."""
    return [
        name
        for name in structure.carriers
        if name not in structure.modules and any(_ends(name, n) for n in names)
    ]


def exchanged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns A [E, r, in] and B [E, out, r] with in and out exchanged."""
    return {"A": tensors["B"].mT.contiguous(), "B": tensors["A"].mT.contiguous()}


def _holds(
    match: re.Match[str], names: Sequence[str], rest: Mapping[str, Tensor], rule_of: Any
) -> bool:
    """Whether a key is one of a module that has some of the parameters. A name without a module may
    be in any: then the layers of experts are known by having several times the rank.
    """
    own = _own(match["module"], names)
    if any("." in name and _own(match["module"], [name]) for name in names) or match["depth"]:
        return bool(own)
    A = rest.get(match[0].replace(".lora_B.", ".lora_A."))
    rank = rule_of(f"{match['module']}.{own[-1]}").r if own else 0
    return bool(own) and A is not None and A.shape[0] > rank


def _own(module: str, names: Sequence[str]) -> list[str]:
    """The parameters of a module that the names choose."""
    parents = [(n.rpartition(".")[0], n.rpartition(".")[2]) for n in names]
    return list(dict.fromkeys(own for parent, own in parents if _ends(module, parent)))


def _ends(name: str, ending: str) -> bool:
    return not ending or name == ending or name.endswith(f".{ending}")


def _packed(layer: CheckpointLayer) -> dict[str, Tensor]:
    t = exchanged(layer.tensors) if layer.kind == EXCHANGED else layer.tensors
    A, B = t["A"], t["B"]
    return {
        "A": A.reshape(-1, A.shape[2]).contiguous(),
        "B": B.permute(1, 2, 0).reshape(B.shape[1], -1).contiguous(),
    }


def _unpacked(A: Tensor, B: Tensor, experts: int) -> dict[str, Tensor]:
    return {
        "A": A.reshape(experts, -1, A.shape[1]).contiguous(),
        "B": B.reshape(B.shape[0], -1, experts).permute(2, 0, 1).contiguous(),
    }


def _disk_shapes(
    shapes: Mapping[str, tuple[int, ...]], exchanged: bool
) -> tuple[tuple[int, int], tuple[int, int], int]:
    """The shapes of lora_A and lora_B, and the number of experts."""
    experts, r, in_ = shapes["A"]
    out = shapes["B"][1]
    a, b = (out, in_) if exchanged else (in_, out)
    return (experts * r, a), (b, r * experts), experts


def _fill(
    checkpoint: Checkpoint,
    module: str,
    tensors: dict[str, Tensor],
    sizes: tuple[tuple[int, int], tuple[int, int], int],
    turned: bool,
) -> None:
    layer, experts = checkpoint.sites[module], sizes[2]
    found = {
        name: take(
            tensors,
            layer.keys[name],
            shape,
            f"{name} of {experts} experts of {module!r}",
            checkpoint.problems,
            values=False,
        )
        for name, shape in zip("AB", sizes[:2], strict=True)
    }
    A, B = found["A"], found["B"]
    if A is not None and B is not None:
        own = _unpacked(A, B, experts)
        layer.tensors |= exchanged(own) if turned else own


def _read_one(
    checkpoint: Checkpoint,
    rest: dict[str, Tensor],
    module: str,
    tensor: str,
    keys: Mapping[str, str],
    rule_of: Any,
    prefix: str,
) -> None:
    name = module if tensor == "weight" else f"{module}.{tensor}"
    rule = rule_of(f"{module}.{tensor}")
    usual = {part: f"{module}.lora_{part}.weight" for part in "AB"}
    here = {part: keys.get(part, usual[part]) for part in "AB"}
    A, B = rest.get(here["A"]), rest.get(here["B"])
    kind = None if tensor == "weight" else KIND
    layer = checkpoint.sites[name] = CheckpointLayer(rule, kind=kind)
    layer.keys = {part: prefix + key for part, key in here.items()}
    experts = 1 if A is None or A.ndim != 2 else max(1, A.shape[0] // rule.r)
    shapes = None if A is None or B is None or A.ndim != 2 or B.ndim != 2 else (A.shape, B.shape)
    r = rule.r * experts
    for part, key in here.items():
        wanted = None if shapes is None else ((r, A.shape[1]) if part == "A" else (B.shape[0], r))  # type: ignore[union-attr]
        found = take(rest, key, wanted, f"{part} of {name!r}", checkpoint.problems, values=False)
        if found is not None:
            layer.tensors[part] = found
    if len(layer.tensors) == 2 and shapes is not None and kind is not None:
        layer.tensors = _unpacked(layer.tensors["A"], layer.tensors["B"], experts)
    elif kind is not None:
        layer.tensors = {}
