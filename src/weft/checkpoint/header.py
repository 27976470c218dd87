"""The header of the tensors' file: everything Weft knows of an adapter, in safetensors metadata
(text by key).

weft             schema, layout, configuration, and checksums of tensors that are drawn from a seed
weft_manifest    layers, base model, names of the tensors and a copy of adapter_config.json, as compressed JSON: names
                 repeat, so this is small even for a thousand layers
weft_checksums   16 hex digits per tensor, in the order of the sorted keys
weft_seal        16 hex digits over the three above
weft_base        numbers of the base's frozen weights (fingerprint.py), sealed by themselves: readers of
                 earlier versions do not know them
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .. import methods
from ..errors import CheckpointError, ConfigError
from ..methods import token_spec
from ..methods.config import CHOOSING
from ..untrusted import json_text
from ..untrusted.json_text import shortened
from . import files
from .checkpoint import Checkpoint, CheckpointLayer, Written
from .drawn import UNKNOWN
from .fingerprint import Fingerprint
from .header_fields import check_fields, geometries, geometry_fields
from .problems import nearest

SCHEMA = 1
LARGEST_MANIFEST = 2**25  # bytes; a model with 50,000 adapted layers needs half of it
_BASE = "weft_base"
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


class Header(NamedTuple):
    """A header that has been read: a checkpoint without tensors, its layout, and the manifest."""

    checkpoint: Checkpoint
    layout: str
    manifest: dict[str, Any]


def metadata_of(
    checkpoint: Checkpoint, layout: str, written: Written, values: bool = True
) -> dict[str, str]:
    """Returns the metadata of a checkpoint in a layout.

    With values=False the checksums are zeros, which are not compressed: the size is the same, and
    no tensor is read.
    """
    head = {
        "schema": SCHEMA,
        "layout": layout,
        "config": methods.to_json(checkpoint.config),
        "shared": checkpoint.checksums,
    }
    manifest = {
        "base": checkpoint.base,
        "sites": [
            [
                module,
                layer.kind or "linear",
                list(layer.known_shape()),
                _differences(layer.rule, checkpoint.config),
            ]
            for module, layer in checkpoint.sites.items()
        ],
        "selected": written.selected,
    }
    if checkpoint.tokens:
        manifest["tokens"] = {
            name: [checkpoint.token_counts.get(name), list(checkpoint.token_ids[name])]
            for name in checkpoint.tokens
        }
    reached = {m: x.reached for m, x in checkpoint.sites.items() if x.reached is not None}
    if reached:
        manifest["reached"] = reached
    kernels = {m: x.geometry for m, x in checkpoint.sites.items() if x.geometry is not None}
    if kernels:
        manifest["convolutions"] = {name: geometry_fields(g) for name, g in kernels.items()}
    if checkpoint.loftq is not None:
        manifest["loftq"] = checkpoint.loftq
    if checkpoint.packed:
        manifest["packed"] = list(checkpoint.packed)
    found = checkpoint.fingerprint
    if found is None:
        return _sealed(head, manifest, written, values)
    manifest["fingerprint"] = found.manifest()
    return {**_sealed(head, manifest, written, values), _BASE: found.text()}


def _sealed(
    head: Mapping[str, Any], manifest: Mapping[str, Any], written: Written, values: bool
) -> dict[str, str]:
    keys = sorted(written.tensors)
    manifest = {**manifest, "keys": keys, "adapter_config": written.config}
    sums = (files.checksum(written.tensors[key]) if values else UNKNOWN for key in keys)
    text = {
        "weft": _dump(head),
        "weft_manifest": base64.b64encode(zlib.compress(_dump(manifest).encode(), 9)).decode(),
        "weft_checksums": "".join(sums),
    }
    return {"format": "pt", **text, "weft_seal": _seal(text)}


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Returns True if Weft wrote the file with this metadata."""
    return any(key.startswith("weft") for key in metadata)


def parse(path: Path, metadata: Mapping[str, str]) -> Header:
    """Reads the metadata of the file `path`. Raises CheckpointError if the header was modified."""
    try:
        if metadata["weft_seal"] != _seal({key: metadata[key] for key in _KEYS}):
            raise CheckpointError(
                f"{path}: its Weft header has changed since it was saved (its own checksum "
                "differs). Use the original."
            )
        head = json_text.loads(metadata["weft"])
        if head["schema"] != SCHEMA:
            raise CheckpointError(
                f"{path} has schema {head['schema']}; this Weft reads schema {SCHEMA}. Update weft."
            )
        manifest = json_text.loads(_inflated(metadata["weft_manifest"]))
        check_fields(head, manifest, metadata["weft_checksums"])
        config = methods.from_json(head["config"])
        layout = head["layout"]
        found = Checkpoint(config, "weft", layout, manifest["base"], checksums=head["shared"])
        found.loftq = manifest.get("loftq")
        found.packed = tuple(manifest.get("packed", ()))
        reached = manifest.get("reached", {})
        kernels = geometries(manifest)
        for module, kind, shape, overrides in manifest["sites"]:
            found.sites[module] = CheckpointLayer(
                methods.replace(config, overrides),
                kind=kind,
                shape=tuple(shape),
                reached=reached.get(module),
                geometry=kernels.get(module),
            )
        for name, (count, ids) in manifest.get("tokens", {}).items():
            found.token_ids[name] = token_spec.ids_of("its tokens", ids)
            found.token_counts |= {} if count is None else {name: int(count)}
        for module, text in reached.items():
            if module not in found.sites or not found.sites[module].rule.is_extra_state(text):
                raise ValueError(f"reached: {shortened(text)} for {shortened(module)}")
        if "fingerprint" in manifest:
            found.fingerprint = Fingerprint.parse(manifest["fingerprint"], metadata[_BASE])
        return Header(found, layout, manifest)
    except ConfigError as error:
        raise CheckpointError(
            f"{path}: the configuration in its header cannot be used: {error}"
        ) from None
    except (LookupError, ValueError, TypeError, AttributeError, zlib.error) as error:
        raise CheckpointError(
            f"{path}: its Weft header is damaged ({type(error).__name__}: {error})."
        ) from None


def check_tensors(header: Header, tensors: dict[str, Tensor], sums: str) -> None:
    """Adds a problem for every tensor [...] that differs from the saved one, and for every one that
    was not saved, which is removed from `tensors`.
    """
    problems, keys = header.checkpoint.problems, header.manifest["keys"]
    known = {key: sums[16 * i : 16 * i + 16] for i, key in enumerate(keys)}
    for key in [key for key in tensors if key not in known]:
        t = tensors.pop(key)
        problems.append(
            f"extra: {key!r} {list(t.shape)} was not saved with this adapter"
            f"{nearest('saved', key, keys, problems)}"
        )
    for key, t in tensors.items():
        found = files.checksum(t)
        if known[key] != found:
            problems.append(
                f"{key!r}: checksum {found}, and {known[key]} was saved; its bits have changed"
            )


def check_config(path: Path, header: Header) -> None:
    """Adds a problem if adapter_config.json is not the one that was saved with the tensors.

    After an interrupted save it is that of the save before; then the header counts.
    """
    saved = header.manifest["adapter_config"]
    for attempt in range(2):  # a save that ends between two looks makes the first one wrong
        beside = files.read_config(path)
        differing = sorted(
            k for k in {*beside, *saved} - _INFORMATIVE if beside.get(k) != saved.get(k)
        )
        if not differing:
            return
        if files.pending(path.parent, saved):
            header.checkpoint.notes.append(
                f"{path.name} is that of an earlier save, since the last one was interrupted; the "
                "configuration in the tensors' file was used"
            )
            return
        if attempt:
            shown = ", ".join(
                f"{k}: {beside.get(k)!r} in it, {saved.get(k)!r} saved" for k in differing[:5]
            )
            header.checkpoint.problems.append(
                f"{path.name} is not the one that was saved with these tensors ({shown}); restore "
                "it, or load the adapter and save it again"
            )


def _inflated(text: str) -> bytes:
    """The compressed JSON; a few kilobytes could become any number of gigabytes."""
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b64decode(text), LARGEST_MANIFEST)
    if not unpacker.eof:
        raise ValueError(f"the manifest is cut off or larger than {LARGEST_MANIFEST:,} bytes")
    return data


def _differences(own: Any, config: Any) -> dict[str, Any]:
    """The fields in which a layer's own configuration differs from the adapter's configuration."""
    return {
        f.name: getattr(own, f.name)
        for f in fields(own)
        if f.name not in CHOOSING and getattr(own, f.name) != getattr(config, f.name)
    }


def _seal(text: Mapping[str, str]) -> str:
    return hashlib.sha256("\x1f".join(text[key] for key in _KEYS).encode()).hexdigest()[:16]


def _dump(value: Any) -> str:
    # Not sorted: of two targets that match a layer the later one wins.
    return json.dumps(value, separators=(",", ":"))


__all__ = ["Header", "check_config", "check_tensors", "metadata_of", "is_ours", "parse"]
