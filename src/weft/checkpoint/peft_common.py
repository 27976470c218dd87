"""What the layouts of `peft` have in common: key prefixes, target modules, refused fields, modules_to_save."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError
from ..model.adapter import Adapter
from .content import Stored

PREFIX = "base_model.model."
_PREFIXES = re.compile(r"((?:module\.|_orig_mod\.)*)base_model\.model\.")
# Fields that change no number of a finished adapter, or say which layers it has, which the tensors say too.
HARMLESS = {"peft_type", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode",
            "auto_mapping", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
            "layers_pattern", "fan_in_fan_out"}


def common_config(adapter: Adapter) -> dict[str, Any]:
    """The fields of every peft configuration that Weft writes."""
    config = getattr(adapter.model, "config", None)
    kinds = {site.host.kind for site in adapter.sites.values()} - {"embedding"}
    return {"base_model_name_or_path": getattr(config, "name_or_path", None) or None, "bias": "none",
            "fan_in_fan_out": kinds == {"conv1d"}, "inference_mode": True, "task_type": None,
            "modules_to_save": list(adapter.config.modules_to_save) or None,
            "target_modules": target_modules(adapter.model, adapter.sites)}


def target_modules(root: nn.Module, sites: Collection[str]) -> list[str] | str:
    """The shortest form that peft resolves to exactly these modules: name endings, else an exact expression."""
    endings = sorted({name.rpartition(".")[2] for name in sites})
    matched = {name for name, _ in root.named_modules() if name and name.rpartition(".")[2] in endings}
    if matched == set(sites):
        return endings
    return "|".join(re.escape(name) for name in sites)


def selected_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Base tensors trained as copies, under every name by which the model reads them."""
    names = {id(module): name for name, module in adapter.model.named_modules()}
    return {f"{PREFIX}{names[id(module)]}.{tensor}": s.trained.detach()
            for s in adapter.selected_tensors.values() for module, tensor in s.holders}


def refuse_fields(config: Mapping[str, Any], carried: Iterable[str], kind: str) -> None:
    """UnsupportedError for a field that is set, changes the adapter, and has no counterpart here."""
    known = HARMLESS | set(carried)
    for field, value in config.items():
        if field not in known and value not in (None, False, [], {}, "none", ""):
            raise UnsupportedError(f"peft's {kind} configuration has {field}={value!r}, which Weft cannot carry. Load it in "
                                   "peft, merge or convert it there, and save it without this field.")


def bare_keys(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Keys without peft's prefix, and without what wrappers of the whole PeftModel have put before it."""
    out: dict[str, Tensor] = {}
    wrappers: set[str] = set()
    for key, t in tensors.items():
        match = _PREFIXES.match(key)
        out[key[match.end():] if match else key] = t
        if match and match[1]:
            wrappers.add(match[1])
    notes += [f"the prefix {prefix!r} was taken off the names in the file" for prefix in sorted(wrappers)]
    if tensors and not any(PREFIX in key for key in tensors):
        notes.append(f"the names in the file lack peft's prefix {PREFIX!r}")
    return out


def rest_is_selected(stored: Stored, tensors: dict[str, Tensor], modules: Collection[str]) -> None:
    """Move what belongs to modules_to_save, or repeats an adapted layer's own weight, out of `tensors`."""
    for name in list(tensors):
        module = name.rpartition(".")[0]
        plain = name.replace(".base_layer.", ".")
        if any(re.search(rf"(^|\.){re.escape(ending)}(\.|$)", module) for ending in modules):
            stored.selected[name.replace(".modules_to_save.default.", ".")] = tensors.pop(name)
        elif plain.rpartition(".")[0] in stored.sites and plain.endswith((".weight", ".bias")):
            stored.copies[plain] = tensors.pop(name)
