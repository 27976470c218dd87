"""The header of the tensors' file: everything Weft knows of an adapter, in safetensors metadata
(text by key).

weft             schema, layout, configuration, and checksums of matrices that are redrawn from a seed
weft_manifest    layers, base model, names of the tensors and a copy of adapter_config.json, as compressed JSON: names
                 repeat, so this is small even for a thousand layers
weft_checksums   16 hex digits a tensor, in the order of the sorted keys
weft_seal        16 hex digits over the three above
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..errors import CheckpointError, ConfigError
from ..methods.config import DTYPES
from ..methods.projections import Projections
from ..model.adapter import Adapter
from ..model.layer import AdapterLayer
from ..model.structure import canonical
from . import files
from .content import Stored, StoredSite, nearest
from .matching import bare, class_of

SCHEMA = 1
FIXED = "fixed"  # among the checksums: of the layers' own frozen tensors
_UNKNOWN = "0" * 16  # in place of a checksum where only the size is asked for
_KEYS = ("weft", "weft_manifest", "weft_checksums")
# What tools fill in on the way to a hub; it changes no number.
_INFORMATIVE = {
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "auto_mapping",
    "peft_version",
}


def make(
    adapter: Adapter,
    layout: str,
    tensors: Mapping[str, Tensor],
    selected: list[str],
    config: Mapping[str, Any],
    values: bool,
) -> dict[str, str]:
    """The metadata. values=False puts zeros for checksums, which are not compressed: the same
    length, no number read.
    """
    head = {
        "schema": SCHEMA,
        "layout": layout,
        "config": methods.to_json(said(adapter)),
        "shared": _shared(adapter, values),
    }
    manifest = {
        "base": base_of(adapter),
        "sites": _sites(adapter),
        "selected": selected,
        **_reached(adapter),
    }
    return sealed(head, manifest, tensors, config, values)


def sealed(
    head: Mapping[str, Any],
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    values: bool = True,
) -> dict[str, str]:
    """The metadata from its parts; `config` is adapter_config.json."""
    keys = sorted(tensors)
    manifest = {**manifest, "keys": keys, "adapter_config": config}
    text = {
        "weft": _dump(head),
        "weft_manifest": base64.b64encode(zlib.compress(_dump(manifest).encode(), 9)).decode(),
        "weft_checksums": "".join(files.checksum(tensors[k]) if values else _UNKNOWN for k in keys),
    }
    return {"format": "pt", **text, "weft_seal": _seal(text)}


def is_ours(metadata: Mapping[str, str]) -> bool:
    return any(key.startswith("weft") for key in metadata)


def read(path: Path, metadata: Mapping[str, str]) -> tuple[Stored, str, dict[str, Any]]:
    """The content without tensors, the layout, and the manifest. Raises CheckpointError where a bit
    is not as it was.
    """
    try:
        if metadata["weft_seal"] != _seal({key: metadata[key] for key in _KEYS}):
            raise CheckpointError(
                f"{path}: its Weft header has changed since it was saved (its own checksum "
                "differs). "
                "Use the original."
            )
        head = json.loads(metadata["weft"])
        if head["schema"] != SCHEMA:
            raise CheckpointError(
                f"{path} has schema {head['schema']}; this Weft reads schema {SCHEMA}. Update weft."
            )
        manifest = json.loads(zlib.decompress(base64.b64decode(metadata["weft_manifest"])))
        config = methods.from_json(head["config"])
        stored = Stored(config, "weft", manifest["base"], checksums=head["shared"])
        for module, kind, (out, in_), overrides in manifest["sites"]:
            stored.sites[module] = StoredSite(
                methods.replace(config, overrides),
                kind=kind,
                shape=(out, in_),
                reached=manifest.get("reached", {}).get(module),
            )
        return stored, head["layout"], manifest
    except ConfigError as error:
        raise CheckpointError(
            f"{path}: the configuration in its header cannot be used: {error}"
        ) from None
    except (LookupError, ValueError, TypeError, AttributeError, zlib.error) as error:
        raise CheckpointError(
            f"{path}: its Weft header is damaged ({type(error).__name__}: {error})."
        ) from None


def check_tensors(
    stored: Stored, tensors: dict[str, Tensor], manifest: Mapping[str, Any], sums: str
) -> None:
    """The file holds the tensors that were saved, bit for bit. Those that were not are taken out of
    `tensors`.
    """
    keys = manifest["keys"]
    known = {key: sums[16 * i : 16 * i + 16] for i, key in enumerate(keys)}
    for key in [key for key in tensors if key not in known]:
        t = tensors.pop(key)
        stored.problems.append(
            f"extra: {key!r} {list(t.shape)} was not saved with this adapter"
            f"{nearest('saved', key, keys, stored.problems)}"
        )
    for key, t in tensors.items():
        found = files.checksum(t)
        if known[key] != found:
            stored.problems.append(
                f"{key!r}: checksum {found}, and {known[key]} was saved; its bits have changed"
            )


def check_config(path: Path, kept: Mapping[str, Any], stored: Stored) -> None:
    """adapter_config.json must be the one that was saved; the header is what counts after an
    interrupted save.
    """
    for attempt in range(2):  # a save that ends between two looks makes the first one wrong
        beside = files.read_config(path)
        differing = sorted(
            k for k in {*beside, *kept} - _INFORMATIVE if beside.get(k) != kept.get(k)
        )
        if not differing:
            return
        if files.pending(path.parent, kept):
            stored.notes.append(
                f"{path.name} is that of an earlier save, since the last one was interrupted; the "
                "configuration in the tensors' file was used"
            )
            return
        if attempt:
            shown = ", ".join(
                f"{k}: {beside.get(k)!r} in it, {kept.get(k)!r} saved" for k in differing[:5]
            )
            stored.problems.append(
                f"{path.name} is not the one that was saved with these tensors ({shown}); restore "
                "it, "
                "or load the adapter and save it anew"
            )


def base_of(adapter: Adapter) -> dict[str, Any]:
    """The architecture that the adapter was made for, and that of the nested model in which all its
    layers lie.
    """
    base = architecture(adapter.model)
    place, inner = _nested(adapter)
    nested = architecture(inner)
    return (
        base
        if nested["model_type"] == base["model_type"]
        else {**base, "inner": {"at": canonical(place), **nested}}
    )


def architecture(root: nn.Module) -> dict[str, Any]:
    """What identifies a model: its class, and transformers' model_type where there is one."""
    return {"class": class_of(root).__name__, "model_type": _model_type(bare(root))}


def shared_key(rule: Any) -> str:
    """share_key as text."""
    return "/".join(map(str, rule.share_key() or ()))


def shared_checksum(shared: Projections) -> str:
    """Its checksum, computed once for matrices that a seed decides."""
    if shared.draw == "stored":
        return shared.checksum()
    return _drawn_checksum(shared.r, shared.max_in, shared.max_out, shared.seed, shared.draw)


@cache
def _drawn_checksum(r: int, max_in: int, max_out: int, seed: int, draw: str) -> str:
    return Projections(r, max_in, max_out, seed, draw).checksum()


def _nested(adapter: Adapter) -> tuple[str, nn.Module]:
    """The innermost module with a model configuration of its own that holds everything the adapter
    trains.
    """
    names = [name.split(".") for name in (*adapter.layers, *adapter.selected_tensors)]
    shared = [
        part
        for i, part in enumerate(names[0])
        if all(name[: i + 1] == names[0][: i + 1] for name in names)
    ]
    places = [".".join(shared[:i]) for i in range(len(shared), 0, -1)]
    modules = {place: module for place, module in adapter.model.named_modules() if place in places}
    return next(
        ((p, modules[p]) for p in places if p in modules and _model_type(modules[p]) is not None),
        ("", adapter.model),
    )


def _model_type(module: nn.Module) -> str | None:
    kind = getattr(getattr(module, "config", None), "model_type", None)
    return kind if isinstance(kind, str) else None


def _common(a: list[str], b: list[str]) -> list[str]:
    return [x for i, x in enumerate(a) if a[: i + 1] == b[: i + 1]]


def trained_tensors(site: AdapterLayer) -> dict[str, Tensor]:
    """The tensors of a layer that a file holds, in the one dtype under which they are written."""
    dtype = DTYPES[_dtype(site)]
    if finished(site.method) is site.method:
        return {name: p.detach().to(dtype) for name, p in site.trainable().items()}
    with torch.no_grad():
        return {name: t.to(dtype) for name, t in site.method.finished_tensors(site).items()}


def finished(config: Any) -> Any:
    """The configuration that a file says: another one where what was trained only made the tensors
    that are written.
    """
    done = config.finished()
    return config if done == config else done


def _reached(adapter: Adapter) -> dict[str, Any]:
    """What training has decided of the layers, beside their tensors; nothing where it has decided
    nothing.
    """
    told = {
        canonical(module): site.method.extra_state(site) for module, site in adapter.layers.items()
    }
    found = {module: text for module, text in told.items() if text is not None}
    return {"reached": found} if found else {}


def fixed_checksum(adapter: Adapter) -> str | None:
    """One checksum over the frozen tensors that the layers have of their own, as they are held;
    None without any.
    """
    return digest_of(
        site.get_buffer(name) for site in adapter.layers.values() for name in site.frozen_names
    )


def digest_of(tensors: Iterable[Tensor]) -> str | None:
    """16 hex digits over the checksums of several tensors; None without any."""
    sums = "".join(map(files.checksum, tensors))
    return hashlib.sha256(sums.encode()).hexdigest()[:16] if sums else None


def _sites(adapter: Adapter) -> list[Any]:
    return [
        [canonical(module), site.base.kind, list(site.shape), _overrides(site, said(adapter))]
        for module, site in adapter.layers.items()
    ]


def said(adapter: Adapter) -> Any:
    """The configuration that a file says; of one that makes its tensors, with the dtype in which
    they are written.
    """
    config, site = adapter.config, next(iter(adapter.layers.values()), None)
    if site is None or finished(config) is config:
        return config
    return methods.replace(finished(config), {"dtype": _dtype(site)})


def _overrides(site: AdapterLayer, config: Any) -> dict[str, Any]:
    """What this layer's rule has other than the configuration; its dtype is that of the tensors,
    cast or not.
    """
    return differences(methods.replace(finished(site.method), {"dtype": _dtype(site)}), config)


def differences(rule: Any, config: Any) -> dict[str, Any]:
    """The fields of a layer's rule that are not those of the adapter's configuration."""
    return {
        f.name: getattr(rule, f.name)
        for f in fields(rule)
        if f.name not in ("targets", "modules_to_save")
        and getattr(rule, f.name) != getattr(config, f.name)
    }


def _dtype(site: AdapterLayer) -> str:
    """The dtype that holds all the trained tensors of a layer: model.bfloat16() casts them too."""
    held = reduce(torch.promote_types, (p.dtype for p in site.trainable().values()))
    if (
        finished(site.method) is not site.method
    ):  # what is made of tensors is made in float32 or wider, and would be rounded
        held = torch.promote_types(held, torch.float32)
    return next(name for name, dtype in DTYPES.items() if dtype == held)


def _shared(adapter: Adapter, values: bool) -> dict[str, str]:
    """Checksums of the matrices that are redrawn from a seed."""
    found = {
        shared_key(site.method): shared_checksum(site.shared) if values else _UNKNOWN
        for site in adapter.layers.values()
        if isinstance(site.shared, Projections)
    }
    if any(site.frozen_names for site in adapter.layers.values()):
        found[FIXED] = (fixed_checksum(adapter) if values else None) or _UNKNOWN
    return found


def _seal(text: Mapping[str, str]) -> str:
    return hashlib.sha256("\x1f".join(text[key] for key in _KEYS).encode()).hexdigest()[:16]


def _dump(value: Any) -> str:
    return json.dumps(
        value, separators=(",", ":")
    )  # unsorted: of two targets that match a layer the later one wins
