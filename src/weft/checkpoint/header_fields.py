"""The form of Weft's header. Its checksum finds damage and no forgery, so every value is checked
before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from ..ops.convolution import Geometry
from ..untrusted.json_text import shortened

WIDEST = 2**40  # of a layer, far above any
_SUM = 16  # hex digits of a checksum


def check_fields(head: Any, manifest: Any, sums: str) -> None:
    """Raises ValueError if a value of the header has another type or range than `metadata_of`
    writes.
    """
    _check(_is_text_map(head["shared"]), "shared", head["shared"])
    _check(isinstance(head["layout"], str), "layout", head["layout"])
    _check(isinstance(manifest, dict), "manifest", manifest)
    for field in ("keys", "selected"):
        names = manifest[field]
        _check(_are_names(names), field, names)
    _check(len(sums) == _SUM * len(manifest["keys"]), "checksums", sums)
    _check(isinstance(manifest["adapter_config"], dict), "adapter_config", "a value")
    _check(_is_text_map(manifest.get("reached", {})), "reached", manifest.get("reached"))
    loftq = manifest.get("loftq")
    _check(isinstance(loftq, str | None), "loftq", loftq)
    packed = manifest.get("packed", [])
    _check(isinstance(packed, list) and all(isinstance(p, str) for p in packed), "packed", packed)
    _check_base(manifest["base"])
    _check_sites(manifest["sites"])


def geometry_fields(geometry: Geometry) -> list[Any]:
    """Returns the fields of a geometry as JSON values."""
    return [list(v) if isinstance(v, tuple) else v for v in astuple(geometry)]


def geometries(manifest: Mapping[str, Any]) -> dict[str, Geometry]:
    """Returns what the kernels of a manifest's convolutions mean, by layer. Raises ValueError if a
    value has another type or range than `geometry_fields` gives, or another width than the layer.
    """
    widths = {module: shape[1] for module, _, shape, _ in manifest["sites"]}
    fields, found = manifest.get("convolutions", {}), {}
    _check(isinstance(fields, dict), "convolutions", fields)
    for module, value in fields.items():
        _check(isinstance(value, list) and len(value) == 6, "a convolution", value)
        inputs, size, groups, dilation, mode, transposed = value
        counts = [inputs, groups]
        for each in (size, dilation):
            _check(isinstance(each, list) and 1 <= len(each) <= 3, "a convolution", value)
            counts += each
        right = all(type(n) is int and 0 < n <= WIDEST for n in counts)
        right = right and isinstance(mode, str) and type(transposed) is bool
        _check(right, "a convolution", value)
        found[module] = Geometry(inputs, tuple(size), groups, tuple(dilation), mode, transposed)
        _check(found[module].width == widths.get(module), "a convolution", value)
    return found


def check_base(base: Any) -> bool:
    """Returns whether a value is an architecture: a class and two texts that may be missing."""
    return (
        isinstance(base, dict)
        and isinstance(base.get("class"), str)
        and all(isinstance(base.get(k), str | None) for k in ("model_type", "library"))
    )


def _check_base(base: Any) -> None:
    if base == {}:
        return
    inner = base.get("inner") if isinstance(base, dict) else None
    right = check_base(base) and (
        inner is None or (check_base(inner) and isinstance(inner.get("at"), str))
    )
    _check(right, "base", base)


def _check_sites(sites: Any) -> None:
    _check(isinstance(sites, list), "sites", sites)
    for site in sites:
        module, kind, shape, overrides = site
        right = (
            isinstance(module, str)
            and isinstance(kind, str)
            and isinstance(shape, list)
            and len(shape) in (2, 3)
            and all(type(n) is int and 0 < n <= WIDEST for n in shape)
            and isinstance(overrides, dict)
        )
        _check(right, "a layer", site)
    _check(_are_names([site[0] for site in sites]), "layers", "two have one name")


def _is_text_map(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values())


def _are_names(value: Any) -> bool:
    """Whether a value is a list of texts without repetition."""
    return (
        isinstance(value, list)
        and all(isinstance(name, str) for name in value)
        and len(set(value)) == len(value)
    )


def _check(right: bool, what: str, value: Any) -> None:
    if not right:
        raise ValueError(f"{what}: {shortened(value)} is not what Weft writes")
