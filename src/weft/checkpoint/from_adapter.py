"""The checkpoint of an adapter on a model, before a format is chosen for it."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..methods.config import DTYPES
from ..methods.projections import Projections
from ..model.adapter import Adapter
from ..model.carried import CHILD
from ..model.layer import AdapterLayer
from ..model.state import base_only, find_state
from ..model.structure import canonical
from .checkpoint import Checkpoint, CheckpointLayer
from .drawn import checksums_of
from .fingerprint import fingerprint_of
from .matching import architecture


def checkpoint_of(adapter: Adapter, values: bool = True, projections: bool = False) -> Checkpoint:
    """Returns everything that is saved of an adapter.

    With values=False the checksums are zeros. With projections=True A and B of VeRA are included;
    they always are if they came from a file and no seed gives them.
    """
    selected = {canonical(name): s.trained.detach() for name, s in adapter.selected_tensors.items()}
    found = Checkpoint(
        saved_config(adapter),
        "weft",
        "",
        base_of(adapter),
        selected=selected,
        checksums=checksums_of(adapter, values),
        fingerprint=fingerprint_of(adapter, values),
        loftq=adapter.loftq,
        packed=adapter.packed_as,
    )
    for module, layer in adapter.layers.items():
        found.sites[canonical(module)] = CheckpointLayer(
            methods.replace(_finished(layer.method), {"dtype": _dtype(layer)}),
            _trained_tensors(layer),
            kind=layer.base.kind,
            shape=layer.full_shape,
            reached=layer.method.extra_state(layer),
            geometry=getattr(layer.base, "geometry", None),
        )
        shared = layer.shared
        if isinstance(shared, Projections) and (projections or shared.draw == "stored"):
            found.projections = found.projections or _float32(shared)
    for module, rows in adapter.token_rows.items():
        name, layer = canonical(module), adapter.token_layers[module]
        count = layer.base.in_features if layer.base.takes_ids else layer.base.out_features
        found.tokens[name], found.token_ids[name] = rows.detach(), layer.method.ids
        found.token_counts[name] = count
    found.aliases, found.repeated = _other_names(adapter, selected)
    return found


def saved_config(adapter: Adapter) -> Any:
    """Returns the configuration that a file records.

    It differs from the adapter's if the trained tensors only produce those that are saved.
    """
    config, layer = adapter.config, next(iter(adapter.layers.values()), None)
    if layer is None or _finished(config) is config:
        return config
    return methods.replace(_finished(config), {"dtype": _dtype(layer)})


def base_of(adapter: Adapter) -> dict[str, Any]:
    """Returns the architecture of the adapter's model, and that of the nested model which has all
    of its layers.
    """
    base = architecture(adapter.model)
    name, inner = _nested(adapter)
    nested = architecture(inner)
    if nested["model_type"] == base["model_type"]:
        return base
    return {**base, "inner": {"at": canonical(name), **nested}}


def _nested(adapter: Adapter) -> tuple[str, nn.Module]:
    """The innermost module with a model configuration of its own that has every trained tensor."""
    every = (*adapter.layers, *adapter.selected_tensors, *adapter.token_layers)
    names = [name.split(".") for name in every]
    shared = [
        part
        for i, part in enumerate(names[0])
        if all(name[: i + 1] == names[0][: i + 1] for name in names)
    ]
    outer = [".".join(shared[:i]) for i in range(len(shared), 0, -1)]
    modules = {name: module for name, module in adapter.model.named_modules() if name in outer}
    return next(
        (
            (name, modules[name])
            for name in outer
            if name in modules and architecture(modules[name])["model_type"] is not None
        ),
        ("", adapter.model),
    )


def _finished(config: Any) -> Any:
    """The configuration of the tensors that are saved; the same object if nothing differs."""
    done = config.finished()
    return config if done == config else done


def _trained_tensors(layer: AdapterLayer) -> dict[str, Tensor]:
    dtype = DTYPES[_dtype(layer)]
    if _finished(layer.method) is layer.method:
        return {name: p.detach().to(dtype) for name, p in layer.stored().items()}
    with torch.no_grad():
        return {name: t.to(dtype) for name, t in layer.method.finished_tensors(layer).items()}


def _dtype(layer: AdapterLayer) -> str:
    """The dtype that holds all tensors of a layer: model.bfloat16() casts those that train, and
    what training began at stays wider.
    """
    widest = reduce(torch.promote_types, (p.dtype for p in layer.trainable().values()))
    for name in layer.start_names:
        start = layer.get_buffer(name)
        if not start.is_meta and not torch.equal(start.to(widest).to(start.dtype), start):
            widest = torch.promote_types(widest, start.dtype)
    if _finished(layer.method) is not layer.method:
        # Tensors that others produce are computed in float32 or wider, and would be rounded.
        widest = torch.promote_types(widest, torch.float32)
    return next(name for name, dtype in DTYPES.items() if dtype == widest)


def _float32(shared: Projections) -> tuple[Tensor, Tensor]:
    """A and B, drawn again if the model's dtype has rounded those in memory."""
    if shared.draw != "stored" and shared.A.dtype != torch.float32:
        shared = Projections(
            shared.r, shared.max_in, shared.max_out, shared.seed, shared.draw, shared.A.device
        )
    return shared.A.detach().float(), shared.B.detach().float()


def _other_names(
    adapter: Adapter, selected: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The other names of tied trained tensors; and the tensors that peft wants beside them.

    peft wraps every module whose name ends in an entry of modules_to_save, even inside a word
    ("pre_classifier"), and wants all of its tensors and buffers; those that Weft does not train
    have the base's values.
    """
    names = {module: canonical(name) for name, module in adapter.model.named_modules()}
    trained = {
        f"{names[module]}.{tensor}".lstrip("."): s.trained.detach()
        for s in adapter.selected_tensors.values()
        for module, tensor in s.holders
    }
    state = find_state(adapter.model)
    merged = (
        {id(b.parameter): b.bits for b in state.merged.backups}
        if state is not None and state.merged is not None
        else {}
    )
    repeated: dict[str, Tensor] = {}
    with base_only(state):
        for module, name in names.items():
            if name.endswith(tuple(adapter.config.modules_to_save)):
                for key, t in module.state_dict(prefix=name + ".", keep_vars=True).items():
                    repeated[canonical(key)] = merged.get(id(t), t).detach()
    return (
        {name: t for name, t in trained.items() if name not in selected},
        {
            name: t
            for name, t in repeated.items()
            if name not in trained and CHILD not in name.split(".")
        },
    )
