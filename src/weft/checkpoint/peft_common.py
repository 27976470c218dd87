"""What the layouts of `peft` have in common: key prefixes, target modules, refused fields,
modules_to_save.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..methods.target_spec import KEYWORDS, is_ending
from ..model.adapter import Adapter
from ..model.layer import CHILD
from ..model.state import base_only, find_state
from ..model.structure import base_modules, canonical
from .content import Stored, take
from .matching import bare, class_of

PREFIX = "base_model.model."
_PREFIXES = re.compile(r"(?P<wrappers>((module|_orig_mod)\.)*)base_model\.model\.")
# Fields that change no number of a finished adapter, or say which layers it has, which the tensors
# say too.
_HARMLESS = {
    "peft_type",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "auto_mapping",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
}


def common_config(adapter: Adapter) -> dict[str, Any]:
    """The fields of every peft configuration that Weft writes."""
    root = bare(adapter.model)
    cls = class_of(root)
    kinds = {site.base.kind for site in adapter.layers.values()} - {"embedding"}
    return {
        **bare_config(adapter.config, _target_modules(adapter), kinds == {"conv1d"}),
        "base_model_name_or_path": getattr(getattr(root, "config", None), "name_or_path", None)
        or None,
        "auto_mapping": {"base_model_class": cls.__name__, "parent_library": cls.__module__},
    }


def bare_config(config: Any, target_modules: list[str] | str, conv1d: bool) -> dict[str, Any]:
    """What can be said without a model. `conv1d`: all adapted layers store their weight as [in,
    out].
    """
    return {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "inference_mode": True,
        "task_type": None,
        "modules_to_save": list(config.modules_to_save) or None,
        "target_modules": target_modules,
    }


def _target_modules(adapter: Adapter) -> list[str] | str:
    """The shortest form that peft resolves to exactly these modules: name endings, else an exact
    expression.
    """
    sites = {canonical(name) for name in adapter.layers}
    endings = {name.rpartition(".")[2] for name in sites}
    matched = {
        canonical(name)
        for name, _ in base_modules(adapter.model)
        if canonical(name).rpartition(".")[2] in endings
    }
    return (
        sorted(endings) if matched == sites else "|".join(re.escape(name) for name in sorted(sites))
    )


def base_tensors(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Base tensors trained as copies, under every name by which the model reads them; and those
    that peft asks for too.

    peft wraps every module whose name ends in an entry of modules_to_save, be it inside a word
    ("pre_classifier"), and wants all of its tensors and buffers; what Weft does not train is
    written with the base's values.
    """
    names = {module: canonical(name) for name, module in adapter.model.named_modules()}
    selected = {
        f"{names[module]}.{tensor}".lstrip("."): s.trained.detach()
        for s in adapter.selected_tensors.values()
        for module, tensor in s.holders
    }
    repeated: dict[str, Tensor] = {}
    state = find_state(adapter.model)
    merged = (
        {id(p): bits for p, bits in state.merged.backups}
        if state is not None and state.merged is not None
        else {}
    )
    with base_only(state):
        for module, name in names.items():
            if name.endswith(tuple(adapter.config.modules_to_save)):
                for key, t in module.state_dict(prefix=name + ".", keep_vars=True).items():
                    repeated[canonical(key)] = merged.get(id(t), t).detach()
    return selected, {
        key: t for key, t in repeated.items() if key not in selected and CHILD not in key.split(".")
    }


def refuse_fields(config: Mapping[str, Any], carried: Iterable[str], kind: str) -> None:
    """UnsupportedError for a field that is set, changes the adapter, and has no counterpart
    here.
    """
    known = _HARMLESS | set(carried)
    for field, value in config.items():
        if field not in known and value not in (None, False, [], {}, "none", ""):
            raise UnsupportedError(
                f"peft's {kind} configuration has {field}={value!r}, which Weft cannot carry. Load "
                "it in "
                "peft, merge or convert it there, and save it without this field."
            )


def fill_in(stored: Stored, config: Mapping[str, Any]) -> None:
    """What peft's configuration says of the base model; and where it picks layers beyond their
    names, those it picked.
    """
    auto = config.get("auto_mapping") or {}
    if auto.get("base_model_class"):
        stored.base = {"class": auto["base_model_class"], "library": auto.get("parent_library")}
    picks = any(config.get(field) for field in ("layers_to_transform", "exclude_modules"))
    if stored.sites and (picks or not config.get("target_modules")):
        names = [name if is_ending(name) else re.escape(name) for name in stored.sites]
        stored.config = replace(stored.config, targets=names)


def targets_of(config: Mapping[str, Any]) -> Any:
    """peft's target_modules as `targets`: a text is an expression over the whole name, a list holds
    endings.
    """
    given = config.get("target_modules") or "all-linear"
    if isinstance(given, str):
        plain = given in KEYWORDS or is_ending(given)
        return f"({given})" if plain and given != "all-linear" else given
    return [ending if is_ending(ending) else rf"(.*\.)?{re.escape(ending)}" for ending in given]


def dtype_of(tensors: Mapping[str, Tensor]) -> str:
    """float32 holds what peft trains, but for float64."""
    return "float64" if any(t.dtype == torch.float64 for t in tensors.values()) else "float32"


def bare_keys(stored: Stored, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without peft's prefix, and without what wrappers of the whole PeftModel have put before
    it.
    """
    out: dict[str, Tensor] = {}
    prefixes = set()
    for key, t in tensors.items():
        prefix = match[0] if (match := _PREFIXES.match(key)) else ""
        prefixes.add(prefix)
        if key[len(prefix) :] in out:
            stored.problems.append(
                f"extra: {key!r}: the file has this tensor under another prefix too"
            )
        out[key[len(prefix) :]] = t
    stored.mapped += [
        f"{prefix}* in the file is * in the model" for prefix in sorted(prefixes - {PREFIX, ""})
    ]
    if PREFIX not in "".join(prefixes) and tensors:
        stored.mapped.append(f"the names in the file lack peft's prefix {PREFIX}")
    return out


def take_trained(
    stored: Stored, tensors: dict[str, Tensor], module: str, keys: Mapping[str, str]
) -> None:
    """Move one layer's tensors, under these keys, into its site."""
    site = stored.sites[module]
    for tensor, shape in site.rule.shapes(*(site.shape or (1, 1))).items():
        site.keys[tensor] = PREFIX + keys[tensor]
        found = take(
            tensors,
            keys[tensor],
            shape if site.shape else None,
            f"{tensor} of {module!r}",
            stored.problems,
        )
        if found is not None:
            site.tensors[tensor] = found


def take_base_tensors(stored: Stored, tensors: dict[str, Tensor], modules: Collection[str]) -> None:
    """Move what belongs to modules_to_save, or repeats an adapted layer's own weight, out of what
    peft saved.
    """
    for name in list(tensors):
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        if plain in stored.selected or plain in stored.repeated:
            continue  # said twice; the second is reported as extra
        if saved_by(plain, modules) is not None:
            stored.selected[plain] = tensors.pop(name)
        elif plain.rpartition(".")[0] in stored.sites and plain.endswith((".weight", ".bias")):
            stored.repeated[plain] = tensors.pop(name)


def saved_by(tensor: str, modules: Collection[str]) -> str | None:
    """The module, the outermost one, that peft's modules_to_save makes the owner of a tensor; None
    where there is none.
    """
    parts = tensor.split(".")
    owners = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((owner for owner in owners if owner.endswith(tuple(modules))), None)
