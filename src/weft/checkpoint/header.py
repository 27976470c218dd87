"""The header of the tensors' file: everything Weft knows of an adapter, in safetensors metadata (text by key).

weft             schema, layout and configuration
weft_manifest    layers, base tensors, base model and shared matrices, as compressed JSON: names repeat, so this is
small even for a thousand layers
weft_checksums   16 hex digits a tensor, in the order of the sorted keys
weft_peft        a copy of adapter_config.json
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import methods
from ..errors import CheckpointError, ConfigError
from ..model.adapter import Adapter
from . import files
from .content import Stored, StoredSite

SCHEMA = 1
UNKNOWN = "0" * 16  # in place of a checksum where only the size is asked for
# What tools fill in on the way to a hub; it changes no number.
INFORMATIVE = {"base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version"}


def make(adapter: Adapter, layout: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any],
         values: bool) -> dict[str, str]:
    """The metadata. values=False puts zeros for checksums: the same length, without reading a number."""
    sums = "".join(files.checksum(tensors[key]) if values else UNKNOWN for key in sorted(tensors))
    return {"format": "pt", "weft": _dump({"schema": SCHEMA, "layout": layout, "config": methods.to_json(adapter.config)}),
            "weft_manifest": _pack({**_manifest(adapter), "keys": sorted(tensors)}), "weft_checksums": sums, "weft_shared": _dump(_shared(adapter, values)),
            "weft_peft": _dump(config)}


def read(path: Path, metadata: Mapping[str, str]) -> tuple[Stored, str, dict[str, Any], dict[str, Any]]:
    """The content without tensors, the layout, the manifest and the copy of adapter_config.json."""
    try:
        head = json.loads(metadata["weft"])
        manifest = json.loads(zlib.decompress(base64.b64decode(metadata["weft_manifest"])))
        schema = head["schema"]
        if schema != SCHEMA:
            raise CheckpointError(f"{path} has schema {schema}; this Weft reads schema {SCHEMA}. Update weft.")
        config = methods.from_json(head["config"])
        stored = Stored(config, "weft", base=manifest["base"], shared_checksums=json.loads(metadata["weft_shared"]))
        for module, kind, shape, overrides in manifest["sites"]:
            stored.sites[module] = StoredSite(methods.replace(config, overrides), {}, {}, kind, (shape[0], shape[1]))
        return stored, head["layout"], manifest, json.loads(metadata["weft_peft"])
    except (KeyError, ValueError, TypeError, zlib.error) as error:
        if isinstance(error, ConfigError):
            raise CheckpointError(f"{path}: the configuration in its header cannot be used: {error}") from None
        raise CheckpointError(f"{path}: its Weft header is damaged ({type(error).__name__}: {error}).") from None


def check_sums(stored: Stored, tensors: Mapping[str, Tensor], sums: str, keys: list[str]) -> None:
    """A problem for every tensor whose bits are not those that were saved under these keys."""
    known = {key: sums[16 * i : 16 * i + 16] for i, key in enumerate(keys)}
    if len(sums) != 16 * len(known):
        stored.problems.append(f"the header has checksums for {len(sums) // 16} tensors, and {len(known)} are expected")
        return
    for key, t in tensors.items():
        found = files.checksum(t)
        if key in known and known[key] != found:
            stored.problems.append(f"{key!r}: checksum {found}, and {known[key]} was saved; its bits have changed")


def check_config(path: Path, beside: Mapping[str, Any], kept: Mapping[str, Any], stored: Stored) -> None:
    """adapter_config.json must be the one that was saved; the header is what counts after an interrupted save."""
    differing = sorted(k for k in {*beside, *kept} - INFORMATIVE if beside.get(k) != kept.get(k))
    if not differing:
        return
    if files.pending(path.parent, kept):
        stored.notes.append(f"{path.name} is that of an earlier save, since the last one was interrupted; the "
                            "configuration in the tensors' file was used")
        return
    shown = ", ".join(f"{k}: {beside.get(k)!r} in it, {kept.get(k)!r} saved" for k in differing[:5])
    stored.problems.append(f"{path.name} is not the one that was saved with these tensors ({shown}); restore it, or load "
                           "the adapter and save it anew")


def base_of(root: nn.Module) -> dict[str, Any]:
    """What identifies the architecture: the class, and transformers' model_type where there is one."""
    config = getattr(root, "config", None)
    return {"class": type(root).__name__, "model_type": getattr(config, "model_type", None)}


def _manifest(adapter: Adapter) -> dict[str, Any]:
    from .matching import canonical

    sites = [[canonical(module), site.host.kind, list(site.shape), _overrides(site.rule, adapter.config)]
             for module, site in adapter.sites.items()]
    return {"base": base_of(adapter.model), "sites": sites,
            "selected": [canonical(name) for name in adapter.selected]}


def _overrides(rule: Any, config: Any) -> dict[str, Any]:
    return {f.name: getattr(rule, f.name) for f in fields(rule)
            if f.name not in ("targets", "modules_to_save") and getattr(rule, f.name) != getattr(config, f.name)}


def _shared(adapter: Adapter, values: bool) -> dict[str, str]:
    """Checksums of the matrices that are redrawn from a seed."""
    out = {}
    for site in adapter.sites.values():
        key = shared_key(site.rule)
        if site.shared is not None and key not in out and hasattr(site.shared, "checksum"):
            out[key] = site.shared.checksum() if values else UNKNOWN
    return out


def shared_key(rule: Any) -> str:
    """share_key as text."""
    return "/".join(map(str, rule.share_key() or ()))


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _pack(value: Any) -> str:
    return base64.b64encode(zlib.compress(_dump(value).encode(), 9)).decode()
