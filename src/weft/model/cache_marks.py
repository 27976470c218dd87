"""Marks on what one forward leaves for the next (key-value caches, recurrent states, an encoder's
output): which adapter computed it. Reading it under another one is an error.

A cache object carries its mark as an attribute, as do tensors in containers. Rows of a cache may be
reordered, selected or repeated between two forwards; then the keys and values of one position tell which
row of the marked cache a row is.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import WeftError
from .active import Active, ActiveAdapters, PerRow, Weighted, describe
from .gate import calls

_MARK = "_weft_filled_by"
_NAMES = ("past_key_values", "cache_params", "cache")
_RESULTS = ("hidden_states", "attentions")  # in a container, and read by no later forward
_tensors: Any = WeakTensorKeyDictionary()  # an attribute would be saved with the tensor
# An adapter's name and number; a sum's names with strengths, and the numbers; or the base.
Name = str | tuple[tuple[str, float], ...]
Who = tuple[Name, int | tuple[int, ...]] | None


@dataclass(frozen=True, eq=False)
class Mark:
    """`rows`: who computed each row, or one entry for all of them. For several, the `keys` and values
    [n, ...] of one position, and the tensor that held them.
    """

    rows: tuple[Who, ...]
    first: tuple[Tensor, ...] = ()
    held: weakref.ref[Tensor] | None = None

    def __reduce__(self) -> Any:  # a pickled cache needs no Weft to be read
        return tuple, ([None if who is None else who[0] for who in self.rows],)

    def __deepcopy__(self, memo: Any) -> Mark:
        return Mark(self.rows, self.first)


def check(active: ActiveAdapters, chosen: Active, given: Iterable[tuple[Any, Any]]) -> None:
    """Called before a forward with its arguments as (name, value). Raises WeftError if it would read
    what another adapter has computed; marks the caches that it will fill.
    """
    rows, others = _rows(active, chosen), active.marked
    for name, value in given:
        for carrier in _carriers(name, value):
            mark = _mark(active, carrier)
            if isinstance(carrier, Tensor):
                if mark is not None and len(mark.rows) in (
                    1,
                    carrier.shape[0] if carrier.dim() else 0,
                ):
                    _compare(mark, [{who} for who in mark.rows], rows)
            elif not _is_filled(carrier):
                put(active, chosen, [carrier])
            elif mark is None:
                _warn(carrier, rows)
                put(active, chosen, [carrier])
            elif not _any_of(others, mark.rows) and not _any_of(others, rows):
                _compare(mark, _candidates(mark, carrier, rows), rows)


def check_part(active: ActiveAdapters, chosen: Active) -> None:
    """`check` of the modules that are being called, if the model itself is not."""
    for _, args, kwargs in calls():
        check(active, chosen, [*enumerate(args), *kwargs.items()])


def put(active: ActiveAdapters, chosen: Active, found: Any) -> None:
    """Marks what a forward has returned or filled."""
    rows = _rows(active, chosen)
    parts = found if isinstance(found, tuple | list) else ()
    for name, value in found.items() if isinstance(found, Mapping) else enumerate(parts):
        for carrier in _carriers(name, value):
            if isinstance(carrier, Tensor):
                _tensors[carrier] = Mark(rows)
                continue
            held = _last_layer(carrier) if len(rows) > 1 else ()
            first = tuple(t.detach()[:, :, :1].clone() for t in held)
            with contextlib.suppress(AttributeError):  # of an object that takes no attribute
                setattr(carrier, _MARK, Mark(rows, first, weakref.ref(held[0]) if held else None))


def _mark(active: ActiveAdapters, carrier: Any) -> Mark | None:
    if isinstance(carrier, Tensor):
        found: Mark | None = _tensors.get(carrier)
        return found
    mark = getattr(carrier, _MARK, None)
    if isinstance(mark, tuple):
        return Mark(tuple(None if n is None else _who(active, n) for n in mark))
    return mark


def _any_of(names: Collection[str], rows: Iterable[Who]) -> bool:
    return bool(names) and any(who is not None and who[0] in names for who in rows)


def _rows(active: ActiveAdapters, chosen: Active) -> tuple[Who, ...]:
    if active.merged is not None:
        chosen = active.merged
    if isinstance(chosen, Weighted):
        return (_sum(active, chosen),)
    names = chosen.names if isinstance(chosen, PerRow) else (chosen,)
    names = names if len(set(names)) > 1 else names[:1]
    return tuple(None if name is None else _who(active, name) for name in names)


def _who(active: ActiveAdapters, name: Name) -> Who:
    if isinstance(name, str):
        return name, active.names.get(name, -1)
    return name, tuple(active.names.get(each, -1) for each, _ in name)


def _sum(active: ActiveAdapters, chosen: Weighted) -> Who:
    """A sum by what it computes, whatever the order: one adapter of strength 1 is that adapter."""
    parts = tuple(sorted((name, w) for name, w in chosen.strengths.items() if w))
    if not parts:
        return None
    return _who(active, parts[0][0] if parts[0][1] == 1.0 and len(parts) == 1 else parts)


def _carriers(name: Any, value: Any, depth: int = 0) -> Iterator[Any]:
    """The cache objects, and the tensors in containers, of one argument or part of an output."""
    if isinstance(value, Tensor):
        if depth:
            yield value
    elif isinstance(name, str) and name.endswith(_RESULTS):
        return
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _carriers(key, part, depth + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _carriers(name, part, depth + 1)
    elif value is None or isinstance(value, nn.Module | str | bytes | int | float):
        return
    elif name in _NAMES or callable(getattr(value, "get_seq_length", None)):
        yield value


def _is_filled(cache: Any) -> bool:
    """Whether a forward has written to a cache since it was made or emptied."""
    length = getattr(cache, "get_seq_length", None)
    if not callable(length):
        return getattr(cache, _MARK, None) is not None
    for layer in getattr(cache, "layers", ()):
        state = getattr(layer, "has_previous_state", None)  # of a recurrent layer, without a length
        if isinstance(state, dict) and any(state.values()):
            return True
    try:
        return bool(length() > 0)
    except Exception:  # all its layers are recurrent
        return False


def _last_layer(cache: Any) -> tuple[Tensor, ...]:
    """The keys and values [rows, heads, tokens, width] of a cache's last layer; () if unknown."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    last = layers[-1] if isinstance(layers, list) and layers else None
    found = getattr(last, "keys", None), getattr(last, "values", None)
    if all(isinstance(t, Tensor) and t.dim() == 4 and t.shape[2] for t in found):
        return found  # type: ignore[return-value]
    return ()


def _candidates(mark: Mark, cache: Any, rows: Sequence[Who]) -> list[set[Who]]:
    """Who may have computed each row of the cache."""
    if len(mark.rows) == 1:
        return [set(mark.rows)] * len(rows)
    held = _last_layer(cache)
    if not mark.first or not held or (mark.held is not None and mark.held() is held[0]):
        same = len(rows) in (1, len(mark.rows))
        return [{who} for who in mark.rows] if same else [set()] * len(rows)
    n = held[0].shape[0]
    equal = torch.ones(n, len(mark.rows), dtype=torch.bool)
    for now, before in zip(held, mark.first, strict=True):
        a, b = now.detach()[:, :, :1].flatten(1), before.to(now.device).flatten(1)
        same_numbers = (a[:, None] == b[None]) | (a[:, None].isnan() & b[None].isnan())
        equal &= same_numbers.all(-1).cpu()
    return [
        {who for who, is_it in zip(mark.rows, row, strict=True) if is_it} for row in equal.tolist()
    ]


def _compare(mark: Mark, found: Sequence[set[Who]], rows: Sequence[Who]) -> None:
    """Raises WeftError unless each row of `rows` is among those found for it."""
    wanted = rows if len(rows) == len(found) else [*rows] * len(found)
    if len(wanted) == len(found) and all(w in f for w, f in zip(wanted, found, strict=True)):
        return
    same_names = _text(mark.rows) == _text(rows)
    gone = ", which was detached" if same_names else ""
    raise WeftError(
        f"this key-value cache was filled under {_text(mark.rows)}{gone}, and now {_text(rows)} is active, which "
        "would read keys and values of other weights. Begin a new cache."
    )


def _text(rows: Sequence[Who]) -> str:
    names = [_described(who) for who in rows]
    return names[0] if len(names) == 1 else f"rows [{', '.join(names)}]"


def _described(who: Who) -> str:
    if who is None:
        return describe(None)
    return describe(who[0] if isinstance(who[0], str) else Weighted(dict(who[0])))


def _warn(cache: Any, rows: Sequence[Who]) -> None:
    if any(who is not None for who in rows):
        warnings.warn(
            f"a {type(cache).__name__} holds keys and values that were computed outside this model's "
            f"forward, or before an adapter was attached. It cannot be known whether {_text(rows)} "
            "computed them.",
            stacklevel=2,
        )
