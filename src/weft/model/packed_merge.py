"""Merging into a packed layer: it stands as a dense nn.Linear, or with codes of W', until
`put_back`.

The module keeps its identity: only its class, its tensors and what the library hangs on it change.
The packed layer is kept as it was in a second module that shares the rest, so putting it back is
exact and costs no copy.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MergeError, UnsupportedError
from ..methods.config import DTYPES
from ..ops.digest import digest
from .adapter import Adapter
from .base_layers import INNER_FORWARD, own_class, view
from .base_layers.packed import PackedLayer
from .carried import is_adapted
from .layer import adapted_class
from .offload import OLD_FORWARD
from .packings import SHADOW, packing_of, parts
from .state import Backup, Merged
from .structure import base_modules

_below: dict[type[nn.Module], type[nn.Module]] = {}
LEAST = 0.5  # of the change, that must survive being packed again


def begin(module: nn.Module) -> nn.Module:
    """Keeps the packed layer as it is, and lets the module have tensors of its own. Returns the
    layer that was kept.
    """
    cls = own_class(module)
    kept = cls.__new__(cls)
    kept.__dict__.update(module.__dict__)
    module.__dict__["_parameters"] = dict(kept._parameters)
    module.__dict__["_buffers"] = dict(kept._buffers)
    module.__dict__[SHADOW] = kept
    return kept


@torch.no_grad()
def make_dense(module: Any, W: Tensor, bias: Tensor | None) -> nn.Parameter:
    """Turns the module into an nn.Linear with the weight W [out, in] and bias [out], which is cast
    to W's dtype. Returns the new weight.
    """
    packing: Any = packing_of(module)
    (out_features, in_features), names = packing.shape(module), packing.holds
    begin(module)
    plain = nn.Linear(1, 1, device="meta")
    weight = nn.Parameter(W.contiguous(), requires_grad=False)
    if bias is not None and (bias.dtype != W.dtype or not isinstance(bias, nn.Parameter)):
        bias = nn.Parameter(bias.detach().to(W.dtype), requires_grad=False)
    for name in (*names, "bias", "weight"):
        module.__dict__.pop(name, None)
    module.__dict__.update({n: v for n, v in plain.__dict__.items() if n not in module.__dict__})
    module.__dict__["_parameters"] = {"weight": weight, "bias": bias}
    module.__dict__["_buffers"] = {}
    module.in_features, module.out_features = in_features, out_features
    try:
        _become(module, nn.Linear)
    except TypeError:  # quanto's class has another layout, which only its own subclasses share
        _become(module, _linear_below(own_class(module)))
    return weight


def _linear_below(cls: type[nn.Module]) -> type[nn.Module]:
    """Returns a subclass that is an nn.Linear in everything; a copy of its instances is a real one."""
    if cls in _below:
        return _below[cls]
    own = ("forward", "extra_repr", "_save_to_state_dict", "_load_from_state_dict", "_apply", "to")
    body = {name: getattr(nn.Linear, name) for name in own}
    body |= {"__reduce_ex__": _reduce, "__module__": nn.Linear.__module__}
    _below[cls] = types.new_class("Linear", (cls,), exec_body=lambda names: names.update(body))
    return _below[cls]


def _reduce(self: nn.Module, protocol: Any) -> Any:
    return nn.Linear.__new__, (nn.Linear,), self.__dict__


@torch.no_grad()
def pack_again(module: Any, W: Tensor) -> nn.Parameter:
    """Packs W [out, in] as the layer's own weight is. Returns the parameter that holds the codes."""
    packing: Any = packing_of(module)
    begin(module)
    packing.pack(module, W)
    found: nn.Parameter = module._parameters[packing.parameter]
    found.requires_grad_(False)
    return found


def put_back(module: nn.Module) -> None:
    """Gives the module the packed layer again that `begin` kept, on the device that it is on now."""
    kept: Any = module.__dict__.pop(SHADOW)
    packing: Any = packing_of(kept)
    now = next(p for p in module._parameters.values() if p is not None).device
    if packing.tensors(kept)[0].device != now:
        kept.to(now)
    for name in (*packing.holds, "bias", "weight", "_parameters", "_buffers"):
        module.__dict__.pop(name, None)
        if name in kept.__dict__:
            module.__dict__[name] = kept.__dict__[name]
    _become(module, type(kept))


def keep(root: nn.Module, record: Merged, others: Iterable[Adapter]) -> None:
    """Forgets the packed layers that were merged into: their modules are what they stand for now.
    The other adapters go on over that, and transformers is told which layers are no longer
    quantised.
    """
    modules = [backup.packed for backup in record.backups if backup.packed is not None]
    for module in modules:
        module.__dict__.pop(SHADOW, None)
    for layer in (layer for adapter in others for layer in adapter.layers.values()):
        if layer.base.module in modules:
            layer.base = view(layer.base.module)
            layer.forget()
    if modules:
        _tell_transformers(root)


def originals(record: Merged) -> dict[int, nn.Parameter | None]:
    """Returns the packed layer's parameter by the identity of the one that stands for it; None if
    the packed layer has none.
    """
    found: dict[int, nn.Parameter | None] = {}
    for backup in record.backups:
        if backup.packed is not None:
            kept: Any = backup.packed.__dict__[SHADOW]
            now = backup.packed._parameters
            found |= {id(p): kept._parameters.get(n) for n, p in now.items() if p is not None}
    return found


@torch.no_grad()
def dequantise(root: nn.Module, dtype: torch.dtype | None) -> list[str]:
    """Makes every packed layer of a model without adapters dense, in `dtype` (None: that of the
    model's other weights), for good. Returns the names of the formats.

    Raises UnsupportedError if a layer cannot be unpacked.
    """
    found = {n: m for n, m in root.named_modules() if packing_of(m) is not None}
    for name, module in found.items():
        fault = packing_of(module).fault(module)  # type: ignore[union-attr]
        if fault is not None:
            raise UnsupportedError(f"{name!r} cannot be made dense: {fault}.")
    views = {name: PackedLayer(module) for name, module in found.items()}
    labels = sorted({layer.packed_as for layer in views.values()})
    dtype = dtype or _dtype_beside(root, views)
    for layer in views.values():
        make_dense(layer.module, layer.weight().to(dtype), layer.bias)
        layer.module.__dict__.pop(SHADOW)
    if views:
        _tell_transformers(root)
    return labels


@torch.no_grad()
def cast_beside(root: nn.Module, name: str) -> None:
    """Casts all parameters of a model but those of packed layers to the dtype of this name."""
    for _, module in base_modules(root):
        if packing_of(module) is None:
            for p in module._parameters.values():
                if p is not None and p.dtype in DTYPES.values():
                    p.data = p.data.to(DTYPES[name])


def _tell_transformers(root: Any) -> None:
    """A model whose layers are dense again is saved, and loaded, without quantisation; of one with
    some packed layers left, the dense ones are named in the list of those that are not packed.
    """
    config = getattr(getattr(root, "config", None), "quantization_config", None)
    if config is None:
        return
    left = [module for module in root.modules() if packing_of(module) is not None]
    if not left:
        quantizer = getattr(root, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.remove_quantization_config(root)
        return
    dense = [n for n, m in root.named_modules() if isinstance(m, nn.Linear) and m not in left]
    for name in ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"):
        if hasattr(config, name):
            setattr(config, name, sorted({*(getattr(config, name) or ()), *dense}))


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = adapted_class(cls) if is_adapted(module) else cls


def is_swapped(module: nn.Module) -> bool:
    """Whether the module stands for a packed layer that has been kept."""
    return SHADOW in module.__dict__


class PackedMerge:
    """One merge into packed layers: the dtype of the dense ones, or how much survived being packed."""

    def __init__(
        self, layers: Mapping[str, PackedLayer], dtype: torch.dtype, requantise: bool
    ) -> None:
        self.dtype, self.requantise, self.count = dtype, requantise, len(layers)
        self.formats = ", ".join(sorted({layer.packed_as for layer in layers.values()}))
        # the dtypes whose rounding the packed layers' outputs have
        self.rounds = {layer.packing.computes_in(layer.packed) for layer in layers.values()}
        self._kept = self._size = 0.0

    def write(self, name: str, base: PackedLayer, W: Tensor, wanted: Tensor) -> Backup:
        """Puts W' [out, in] into a layer whose weight was W [out, in], in the place of its codes."""
        module: Any = base.module
        codes = module._parameters[base.packing.parameter]
        try:
            if self.requantise:
                new, tensor = pack_again(module, wanted), base.packing.parameter
                change = wanted.double() - W
                self._size += float(change.square().sum())
                self._kept += float(((base.packing.weight(module).double() - W) * change).sum())
            else:
                new, tensor = make_dense(module, wanted.to(self.dtype), base.bias), "weight"
        except BaseException:
            if is_swapped(module):
                put_back(module)
            raise
        full = f"{name}.{tensor}".lstrip(".")
        return Backup(
            full, new, codes, new._version, digest_of(new), packed=module, dtype=new.dtype
        )

    def written(self, base: PackedLayer, cast: Tensor) -> Tensor:
        """Returns the W [out, in] that the layer has now."""
        return base.packing.weight(base.module) if self.requantise else cast

    def check_survived(self) -> float | None:
        """Returns the share of the change that is left, or None if nothing was packed. Raises
        MergeError below one half.
        """
        if not self.requantise:
            return None
        share = self._kept / self._size if self._size else 1.0
        if not share >= LEAST:
            raise MergeError(
                f"requantise=True: of the adapter's change, {100 * share:.3g} % would survive being packed "
                f"as {self.formats} again, and less than {100 * LEAST:.0f} % is refused; nothing was merged. "
                "Merge into dense layers (requantise=False), or keep the adapter beside the packed weights."
            )
        return share

    def facts(self) -> dict[str, Any]:
        """Returns the fields of the report."""
        if not self.count:
            return {}
        dtype = None if self.requantise else self.dtype
        return {"packed": self.count, "formats": self.formats, "dtype": dtype}


def plan(adapter: Adapter, dtype: torch.dtype | None, requantise: bool) -> PackedMerge:
    """Returns how to merge an adapter into the packed layers that it is on.

    Raises UnsupportedError if that cannot be done as asked.
    """
    bases = {name: layer.base for name, layer in adapter.layers.items()}
    layers = {name: base for name, base in bases.items() if isinstance(base, PackedLayer)}
    if not layers and (dtype is not None or requantise):
        asked = "requantise=True" if requantise else f"dtype={dtype}"
        raise UnsupportedError(
            f"merge({asked}) is for quantised layers, and adapter {adapter.name!r} is on none. Leave it out"
            "; the weights keep their dtype."
        )
    if dtype is not None and (requantise or dtype not in DTYPES.values()):
        raise UnsupportedError(
            f"merge(dtype={dtype}): the dtype of dense layers is one of {list(DTYPES)}, and "
            "requantise=True makes none."
        )
    for name, layer in layers.items():
        if INNER_FORWARD in layer.module.__dict__ or OLD_FORWARD in layer.module.__dict__:
            raise UnsupportedError(
                f"{name!r} has a forward that another library put on it (accelerate?), which belongs to the "
                "packed layer. Load the model on one device, without hooks, and merge there."
            )
        why = layer.packing.why_not_pack(layer.module) if requantise else None
        if why is not None:
            raise UnsupportedError(f"requantise=True: {name!r} is {layer.packed_as}: {why}.")
    return PackedMerge(layers, dtype or _dtype_beside(adapter.model, layers), requantise)


def _dtype_beside(root: nn.Module, layers: Mapping[str, PackedLayer]) -> torch.dtype:
    """The dtype of the base's first dense weight; of what the codes stand for if there is none."""
    for _, module in base_modules(root):
        for p in module._parameters.values() if packing_of(module) is None else ():
            if p is not None and p.dtype in DTYPES.values():
                return p.dtype
    for layer in layers.values():
        return layer.packing.dtype(layer.packed)
    return torch.float32


def digest_of(t: Tensor) -> tuple[int, int]:
    """Returns the digest of a tensor [...], packed or not."""
    found = [digest(part) for part in parts(t)]
    return sum(a for a, _ in found), sum((i + 1) * b for i, (_, b) in enumerate(found))
