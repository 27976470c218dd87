"""Shared by the formats of peft in which every layer has keys of its own: prefixes, target modules,
fields that are not supported, base tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, UnsupportedError
from ...methods.field_types import WrongType, conform, short
from ...methods.target_spec import KEYWORDS, is_ending
from ...model.structure import Structure, canonical
from ...untrusted.json_text import shortened
from ..checkpoint import Checkpoint, CheckpointLayer, Written
from ..header_fields import check_base
from ..matching import bare, class_of, owner_of
from ..problems import report_extra, take
from . import peft_attention, peft_experts, peft_tokens
from . import peft_bias as bias
from .native import take_selected, take_tokens
from .peft_experts import is_stack
from .peft_picks import adapted_by, picks_by_number

PREFIX = "base_model.model."
_PREFIXES = re.compile(r"(?P<wrappers>((module|_orig_mod)\.)*)base_model\.model\.")
# Fields that change no value of a finished adapter, or say which layers it has, as the tensors do;
# each with the type of its value.
_HARMLESS: Mapping[str, Any] = {
    "peft_type": Any,
    "peft_version": Any,
    "base_model_name_or_path": Any,
    "revision": Any,
    "task_type": Any,
    "inference_mode": Any,
    "auto_mapping": Mapping[str, Any] | None,
    "target_modules": str | list[str] | None,
    "exclude_modules": str | list[str] | None,
    "modules_to_save": list[str] | None,
    "layers_to_transform": int | list[int] | None,
    "layers_pattern": str | list[str] | None,
    "fan_in_fan_out": bool | None,
}
KeyOf = Callable[[str, str, str | None], str]  # module, tensor, kind -> key without PREFIX


def keys_of(names: Mapping[str, str]) -> KeyOf:
    """Returns the function of keys for tensors that are called `names`, whatever the layer."""
    return lambda module, tensor, kind: f"{module}.{names[tensor]}"


def write_layers(
    checkpoint: Checkpoint,
    model: nn.Module | None,
    key: KeyOf,
    fields: Mapping[str, Any],
    form: Callable[[CheckpointLayer, str, Tensor], Tensor] = lambda layer, tensor, t: t,
) -> Written:
    """Returns the files: tensors under their keys, the base tensors, and the configuration with the
    method's own `fields`. `form` gives a layer's tensor the shape that it has in the file.
    """
    tensors = {
        PREFIX + key(module, name, layer.kind): form(layer, name, t)
        for module, layer in checkpoint.sites.items()
        for name, t in layer.tensors.items()
    }
    tensors |= {PREFIX + name: t for name, t in checkpoint.repeated.items()}
    selected = {**checkpoint.selected, **checkpoint.aliases}
    tensors |= {PREFIX + bias.key_of(checkpoint, name): t for name, t in selected.items()}
    tensors |= {PREFIX + peft_tokens.rows_key(name): t for name, t in checkpoint.tokens.items()}
    common = {**_common_fields(checkpoint, model), **peft_tokens.field(checkpoint)}
    return Written(tensors, {**common, **fields}, list(selected))


def _common_fields(checkpoint: Checkpoint, model: nn.Module | None) -> dict[str, Any]:
    """The fields of every configuration, and the base model if there is one at hand."""
    config: Any = checkpoint.config
    common: dict[str, Any] = {
        "base_model_name_or_path": None,
        "bias": bias.bias_field(checkpoint) or "none",
        "fan_in_fan_out": checkpoint.kinds == {"conv1d"},
        "inference_mode": True,
        "task_type": None,
        "modules_to_save": list(config.modules_to_save) or None,
        "target_modules": _target_modules(checkpoint, model),
    }
    if model is not None:
        root = bare(model)
        cls = class_of(root)
        name = getattr(getattr(root, "config", None), "name_or_path", None)
        common["base_model_name_or_path"] = name or None
        common["auto_mapping"] = {
            "base_model_class": cls.__name__,
            "parent_library": cls.__module__,
        }
    return common


def _target_modules(checkpoint: Checkpoint, model: nn.Module | None) -> list[str] | str:
    """The shortest form that peft resolves to exactly these modules: name endings if the model
    shows that they suffice, else an exact expression.
    """
    names = {
        peft_attention.target_of(name, layer.kind)
        for name, layer in checkpoint.sites.items()
        if not is_stack(layer)
    }
    if not names:
        return []
    endings = {name.rpartition(".")[2] for name in names}
    if model is not None and names == {
        name
        for name in map(canonical, Structure.of(model).modules)
        if name.rpartition(".")[2] in endings
    }:
        return sorted(endings)
    return "|".join(re.escape(name) for name in sorted(names))


def refuse_fields(config: Mapping[str, Any], supported: Mapping[str, Any], kind: str) -> None:
    """Raises UnsupportedError for a field that is set, changes the adapter, and is not supported.

    `supported` maps the other fields to the types of their values. Raises ConfigError for a value
    of another type: the text "false" is no boolean.
    """
    known = {**_HARMLESS, **supported}
    for field, value in config.items():
        if field in known:
            _check_type(known[field], field, value)
        elif value not in (None, False, [], {}, "none", ""):
            raise UnsupportedError(
                f"peft's {kind} configuration has {field}={value!r}, which Weft cannot carry. Load "
                "it in peft, merge or convert it there, and save it without this field."
            )


def _check_type(hint: Any, field: str, value: Any) -> None:
    try:
        conform(hint, value)
    except WrongType as error:
        raise ConfigError(f"{field}={short(value)}: {field} must be {error}.") from None


def targets_of(config: Mapping[str, Any]) -> Any:
    """Returns peft's target_modules as `targets`: a string is an expression over the whole name, a
    list has endings.
    """
    given = config.get("target_modules") or "all-linear"
    if isinstance(given, str):
        plain = given in KEYWORDS or is_ending(given)
        return f"({given})" if plain and given != "all-linear" else given
    return [ending if is_ending(ending) else rf"(.*\.)?{re.escape(ending)}" for ending in given]


def dtype_of(tensors: Mapping[str, Tensor]) -> str:
    """Returns the dtype of an adapter with these tensors [...]: float32, or float64 if one is."""
    return "float64" if any(t.dtype == torch.float64 for t in tensors.values()) else "float32"


def bare_keys(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors [...] without peft's prefix, and without any prefix of wrappers around
    the whole PeftModel.
    """
    out: dict[str, Tensor] = {}
    prefixes = set()
    for key, t in tensors.items():
        prefix = match[0] if (match := _PREFIXES.match(key)) else ""
        prefixes.add(prefix)
        if key[len(prefix) :] in out:
            checkpoint.problems.append(
                f"extra: {key!r}: the file has this tensor under another prefix too"
            )
        out[key[len(prefix) :]] = t
    checkpoint.mapped += [
        f"{prefix}* in the file is * in the model" for prefix in sorted(prefixes - {PREFIX, ""})
    ]
    if PREFIX not in "".join(prefixes) and tensors:
        checkpoint.mapped.append(f"the names in the file lack peft's prefix {PREFIX}")
    return out


def read_layers(
    checkpoint: Checkpoint,
    rest: dict[str, Tensor],
    pattern: re.Pattern[str],
    parts: Mapping[str, str],
    key: KeyOf,
    layer_of: Callable[[str, str], CheckpointLayer],
) -> None:
    """Moves the tensors of the layers out of `rest` into the checkpoint.

    `pattern` splits a key into "module" and "part": "h.0.attn.lora_A.weight" [r, in] has the module
    "h.0.attn" and the part "lora_A". `parts` maps parts to names of tensors, and `layer_of(module,
    part)` creates a new layer.
    """
    spelled: dict[str, dict[str, str]] = {}
    for name in rest:
        if match := pattern.fullmatch(name):
            module, part = match["module"], match["part"]
            spelled.setdefault(module, {})[parts[part]] = name
            if module not in checkpoint.sites:
                checkpoint.sites[module] = layer_of(module, part)
    for module, found in spelled.items():
        kind = checkpoint.sites[module].kind
        usual = {tensor: key(module, tensor, kind) for tensor in parts.values()}
        _take_layer(checkpoint, rest, module, {**usual, **found})


def finish_reading(
    checkpoint: Checkpoint, rest: dict[str, Tensor], config: Mapping[str, Any], first: list[str]
) -> Checkpoint:
    """Takes the base model and the base tensors from peft's files and reports the tensors left
    over.

    `first` are the first keys in the file, for the message if it has no layer.
    """
    if not checkpoint.sites:
        checkpoint.problems.append(
            f"the file holds no tensor of peft's {checkpoint.format}; its names begin with {first}"
        )
    auto = config.get("auto_mapping") or {}
    if not isinstance(auto, Mapping):
        raise ConfigError(f"auto_mapping={shortened(auto)}: an object is expected.")
    if auto.get("base_model_class"):
        checkpoint.base = {"class": auto["base_model_class"], "library": auto.get("parent_library")}
        if not check_base(checkpoint.base):
            raise ConfigError(f"auto_mapping={shortened(auto)}: two names are expected.")
    picks, parameters = picks_by_number(config), peft_experts.names_of(config)
    if picks or parameters:
        checkpoint.adapted = _adapted(config, parameters)
    if checkpoint.sites and (picks or parameters or not config.get("target_modules")):
        # The configuration selects layers by more than their names, so those of the file count.
        names = [name if is_ending(name) else re.escape(name) for name in checkpoint.sites]
        checkpoint.config = replace(checkpoint.config, targets=names)
    bias.take_biases(checkpoint, rest, config.get("bias") or "none")
    peft_tokens.take_tokens(checkpoint, rest, config)
    take_base_tensors(checkpoint, rest)
    expected = [key for layer in checkpoint.sites.values() for key in layer.keys.values()]
    report_extra(checkpoint.problems, rest, expected)
    return checkpoint


def _adapted(
    config: Mapping[str, Any], names: Collection[str]
) -> Callable[[Structure, Collection[str]], list[str]]:
    """The function of a model, and of the tensors trained in full there, to the layers that peft
    adapts in it; `names` are parameters.
    """
    modules = adapted_by(config)

    def adapted(structure: Structure, trained: Collection[str]) -> list[str]:
        found = [] if modules is None else modules(structure, trained)
        return found + peft_experts.adapted_by(list(names), structure)

    return adapted


def take_base_tensors(checkpoint: Checkpoint, rest: dict[str, Tensor]) -> None:
    """Moves tensors of modules_to_save, and an adapted layer's own weight [out, in] and bias [out],
    out of `rest`.
    """
    config: Any = checkpoint.config
    for name in list(rest):
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        if plain in checkpoint.selected or plain in checkpoint.repeated:
            continue  # the second tensor of a name is reported as extra
        if owner_of(plain, config.modules_to_save) is not None:
            checkpoint.selected[plain] = rest.pop(name)
        elif plain.rpartition(".")[0] in checkpoint.sites and plain.endswith((".weight", ".bias")):
            checkpoint.repeated[plain] = rest.pop(name)


def restore_layers(
    checkpoint: Checkpoint,
    tensors: dict[str, Tensor],
    manifest: Mapping[str, Any],
    key: KeyOf,
    taken: Collection[str] = (),
) -> None:
    """Fills a checkpoint from a file that Weft wrote in a format of peft. `taken`: keys already
    read.
    """
    present = set(tensors)
    plain = {name.removeprefix(PREFIX): t for name, t in tensors.items()}
    for module, layer in checkpoint.sites.items():
        if is_stack(layer):
            continue
        shapes = layer.rule.shapes(*layer.known_shape()[-2:])
        _take_layer(checkpoint, plain, module, {t: key(module, t, layer.kind) for t in shapes})
    for name in manifest["selected"]:  # under the names that they have in the base
        if (key_in_file := bias.key_of(checkpoint, name)) in plain:
            plain[name] = plain.pop(key_in_file)
    take_selected(checkpoint, plain, "", manifest["selected"])
    rows = {name: peft_tokens.rows_key(name) for name in checkpoint.token_ids}
    take_tokens(checkpoint, plain, rows)
    checkpoint.repeated = plain
    reported = {name for layer in checkpoint.sites.values() for name in layer.keys.values()}
    reported |= {PREFIX + key for key in rows.values()}
    reported |= {PREFIX + bias.key_of(checkpoint, n) for n in manifest["selected"]} | set(taken)
    checkpoint.problems += [
        f"missing: {name!r} was saved with this adapter"
        for name in manifest["keys"]
        if name not in present and name not in reported
    ]


def _take_layer(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], module: str, keys: Mapping[str, str]
) -> None:
    layer = checkpoint.sites[module]
    if layer.shape:
        size = layer.shape[-2:]
    else:
        size = _size_of(layer.rule, {t: tensors.get(key) for t, key in keys.items()})
    for tensor, wanted in layer.rule.shapes(*size).items():
        layer.keys[tensor] = PREFIX + keys[tensor]
        what = f"{tensor} of {module!r}"
        found = take(tensors, keys[tensor], wanted, what, checkpoint.problems, values=False)
        if found is not None:
            layer.tensors[tensor] = found


def _size_of(rule: Any, tensors: Mapping[str, Tensor | None]) -> tuple[int, int]:
    """Returns (out, in) of a layer, from the sides of its tensors that depend on them; 1 if none
    does.
    """
    unit, sizes = rule.shapes(1, 1), [1, 1]
    for side, probe in enumerate(((2, 1), (1, 2))):
        for name, shape in rule.shapes(*probe).items():
            t = tensors.get(name)
            if t is not None and t.ndim == len(shape):
                for dim, length in enumerate(shape):
                    if length != unit[name][dim]:
                        sizes[side] = t.shape[dim]
    return sizes[0], sizes[1]
