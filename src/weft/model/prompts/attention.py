"""Trained keys and values before those of the tokens, in attention that goes through transformers'
AttentionInterface.

An attention module asks that interface for the function that its config names ("sdpa", "eager"). We
register a function "weft_sdpa" (and one for masks, the same as for "sdpa"), which puts the active
prefix before the keys and values, widens the mask, and calls the model's own function; and write
its name into the config for as long as a prefix is attached. Nothing is in the key-value cache, so
any kind of cache works, and none. transformers is never imported here: a model whose module asks
for the interface has done that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import WeftError
from ..active import ActiveAdapters, PerRow, names_of
from ..carried import active_of, layers_of
from ..row_calls import layout_of
from ..row_probe import Recorder
from .forward import code_names, forward_of

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
KNOWN = ("eager", "sdpa")
_OURS = "weft_"


def asks(module: nn.Module) -> bool:
    """Returns True if the forward asks transformers' AttentionInterface for its function."""
    return INTERFACE in code_names(type(module))


def why_no_prefix(module: nn.Module) -> str | None:
    """Returns the reason why such a module cannot have a prefix, or None if it can."""
    name = own_name(module)
    if name not in KNOWN:
        return f'its attention is {name!r}, and Weft extends {list(KNOWN)}: model.set_attn_implementation("sdpa")'
    if name == "eager" and (
        getattr(module, "reorder_and_upcast_attn", False) or not callable(_eager(module))
    ):
        return (
            'its "eager" attention is not a function that could be called with a prefix: '
            'model.set_attn_implementation("sdpa")'
        )
    return None


def own_name(module: nn.Module) -> str | None:
    """Returns the implementation that the user has set, whether or not a prefix is attached."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return name.removeprefix(_OURS) if isinstance(name, str) else None


def register() -> None:
    """Registers our functions with transformers, in this process."""
    interface = sys.modules["transformers.modeling_utils"].AttentionInterface
    masks: Any = sys.modules["transformers.masking_utils"]
    for name in KNOWN:
        interface.register(_OURS + name, _FUNCTIONS[name])
        masks.AttentionMaskInterface.register(
            _OURS + name, masks.ALL_MASK_ATTENTION_FUNCTIONS[name]
        )


def claim(modules: Iterable[nn.Module]) -> None:
    """Routes the attention of these modules through our functions."""
    register()
    ours = list(modules)
    for module in ours:
        _own(module, str(own_name(module)))
    for config in _configs(ours):
        if not config._attn_implementation.startswith(_OURS):
            config._attn_implementation = _OURS + config._attn_implementation


def release(modules: Iterable[nn.Module], still: Iterable[nn.Module]) -> None:
    """Restores the names in the configs, except those of modules that `still` have a prefix."""
    needed = {id(config) for config in _configs(still)}
    for config in _configs(modules):
        if id(config) not in needed:
            config._attn_implementation = config._attn_implementation.removeprefix(_OURS)


def check(module: nn.Module, args: Any, kwargs: Any) -> None:
    """A forward pre-hook. Raises WeftError if the config was changed, so that the active prefix
    would be ignored.
    """
    adapters = active_of(module)
    if adapters is None:
        return
    active = adapters.current(module.training)
    name: Any = getattr(module, "config")._attn_implementation  # noqa: B009 - mypy takes the attribute for a Tensor
    if not str(name).startswith(_OURS) and any(n in layers_of(module) for n in names_of(active)):
        raise WeftError(
            f"the model's attention was set to {name!r} after an adapter with keys and values was "
            "attached, which would leave it out. Detach the adapter, set it, and attach it again."
        )


def _configs(modules: Iterable[nn.Module]) -> list[Any]:
    return list({id(m.config): m.config for m in modules}.values())


def _eager(module: nn.Module) -> Any:
    return forward_of(type(module)).__globals__.get("eager_attention_forward")


def _own(module: nn.Module, name: str) -> Callable[..., Any]:
    """The attention function of this name that the module itself would use."""
    cls = type(module)
    if cls not in _interfaces:
        _interfaces[cls] = forward_of(cls).__globals__[INTERFACE], _eager(module)
    interface, eager = _interfaces[cls]
    found: Callable[..., Any] = interface.get_interface(name, eager)
    return found


_interfaces: dict[
    type[nn.Module], tuple[Any, Any]
] = {}  # by class; filled at attach, so that tracing finds it there


def _over(name: str) -> Callable[..., Any]:
    """The attention function `name`, with the active prefix before its keys and values."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Attends from query [batch, heads, tokens, width] to the prefix, keys and values.

        The mask [batch, 1, tokens, keys] is widened by the n columns of the prefix.
        """
        run = _own(module, name)
        found = _prefix(module, key, value)
        if found is None:
            return run(module, query, key, value, attention_mask, *args, **kwargs)
        keys, values, rows = found
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        mask = _mask(attention_mask, name, query, key, bool(causal))
        mask = _widened(mask, rows, query, key, keys.shape[2], name)
        if kwargs.get("position_bias") is not None:
            bias = kwargs["position_bias"]
            kwargs["position_bias"] = torch.cat(
                [bias.new_zeros(*bias.shape[:-1], keys.shape[2]), bias], dim=-1
            )
        return run(
            module,
            query,
            torch.cat([keys, key], dim=2),
            torch.cat([values, value], dim=2),
            mask,
            *args,
            **kwargs,
        )

    return attention


_FUNCTIONS = {name: _over(name) for name in KNOWN}


def _prefix(
    module: nn.Module, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Keys and values [rows, kv heads, n, width] of the active prefix, and, if rows have different
    ones, which of the n positions each row has [rows, n]. None if no prefix is active here.
    """
    adapters = active_of(module)
    if adapters is None:
        return None
    active, layers = adapters.current(module.training), layers_of(module)
    if isinstance(active, PerRow):
        return _by_row(active, adapters, module, key, value)
    if not isinstance(active, str) or active not in layers:
        return None
    keys, values = _of(layers[active], key, value)
    return keys.expand(key.shape[0], -1, -1, -1), values.expand(key.shape[0], -1, -1, -1), None


def _of(layer: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """One adapter's keys and values as [1, kv heads, n, width]."""
    parts = []
    for trained, own in zip(layer.method.keys_values(layer), (key, value), strict=True):
        heads, width = own.shape[1], own.shape[-1]
        if trained.shape[1] != heads * width:
            raise WeftError(
                f"the attention works on {heads} heads of width {width} for keys and values, and "
                f"the adapter's are {trained.shape[1]} wide: this model's attention cannot be extended."
            )
        parts.append(trained.to(own.dtype).view(-1, heads, width).transpose(0, 1)[None])
    return parts[0], parts[1]


def _by_row(
    rows: PerRow, active: ActiveAdapters, module: nn.Module, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    layers: Any = layers_of(module)
    if isinstance(rows, Recorder):
        rows.see(module, layers, key, feature_dims=3)
        return None
    names = [name for name in rows.groups if name in layers]
    if not names:
        return None
    rows, layout = layout_of(rows, active, module, key, feature_dims=3)
    if not layout.is_first or len(rows.names) != key.shape[0]:
        raise WeftError(f"{type(module).__name__} has keys whose first dimension is not the batch.")
    n = max(layers[name].method.n for name in names)
    keys = key.new_zeros(*key.shape[:2], n, key.shape[3])
    values = value.new_zeros(*value.shape[:2], n, value.shape[3])
    has = torch.zeros(key.shape[0], n, dtype=torch.bool, device=key.device)
    for name in names:
        index = rows.index(name, key.shape[0], key.device)
        own = layers[name].method.n
        k, v = (
            torch.nn.functional.pad(t, (0, 0, 0, n - own)).expand(len(index), -1, -1, -1)
            for t in _of(layers[name], key, value)
        )
        keys, values = keys.index_copy(0, index, k), values.index_copy(0, index, v)
        has[index, :own] = True
    return keys, values, has


def _mask(
    mask: Tensor | None, name: str, query: Tensor, key: Tensor, causal: bool
) -> Tensor | None:
    """Returns the mask, or the causal one that sdpa would create by itself."""
    if mask is not None or name != "sdpa" or not causal or query.shape[2] == 1:
        return mask
    return torch.ones(
        1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=key.device
    ).tril()


def _widened(
    mask: Tensor | None, rows: Tensor | None, query: Tensor, key: Tensor, n: int, name: str
) -> Tensor | None:
    """The mask [.., .., queries, n + keys]: all rows see the prefix, or only those that have
    one.
    """
    if mask is None and rows is None:
        return None
    if mask is None:
        mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
        mask = mask if name == "sdpa" else torch.zeros_like(mask, dtype=query.dtype)
    mask = mask[..., : key.shape[2]]
    if rows is None:
        extra = torch.ones(1, 1, 1, n, dtype=torch.bool, device=key.device)
    else:
        extra = rows[:, None, None, :]
        mask = mask.expand(rows.shape[0], -1, -1, -1)
    if mask.dtype != torch.bool:
        least = torch.finfo(mask.dtype).min
        extra = torch.zeros(extra.shape, dtype=mask.dtype, device=key.device).masked_fill(
            ~extra, least
        )
    return torch.cat([extra.expand(mask.shape[0], mask.shape[1], mask.shape[2], n), mask], dim=-1)
