"""Marks on what one forward leaves for the next (key-value caches, recurrent states, an encoder's
output): which adapter computed it. Reading it under another one is an error.

A cache object carries its mark as an attribute, as do tensors in containers. Rows of a cache may be
reordered, selected or repeated between two forwards; then all that one of its layers holds of a row
tells which row of the marked cache it is.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import WeftError
from ..ops.digest import digest
from .active import Active, ActiveAdapters, PerRow, Weighted, describe
from .gate import calls
from .row_inputs import tensors

_MARK = "_weft_filled_by"
_NAMES = ("past_key_values", "cache_params", "cache")
_RESULTS = ("hidden_states", "attentions")  # in a container, and read by no later forward
_CHANGED = ", whose tensors have changed since"
_tensors: Any = WeakTensorKeyDictionary()  # an attribute would be saved with the tensor
# An adapter's name and stamp (`ActiveAdapters.stamp`); a sum's names with strengths, and the stamps;
# or the base.
Name = str | tuple[tuple[str, float], ...]
Who = tuple[Name, Any] | None


@dataclass(frozen=True, eq=False)
class Mark:
    """`rows`: who computed each row, or one entry for all of them. For several, the tensors [n,
    ...] of one layer of the cache by name, which share its memory until its rows change places, and
    a reference to one of them.
    """

    rows: tuple[Who, ...]
    held: Mapping[Any, Tensor] = field(default_factory=dict)
    last: weakref.ref[Tensor] | None = None

    def __reduce__(self) -> Any:  # a pickled cache needs no Weft to be read
        return tuple, ([None if who is None else who[0] for who in self.rows],)

    def __deepcopy__(self, memo: Any) -> Mark:
        return Mark(self.rows, copy.deepcopy(self.held, memo))


def check(active: ActiveAdapters, chosen: Active, given: Iterable[tuple[Any, Any]]) -> None:
    """Called before a forward with its arguments as (name, value). Raises WeftError if it would
    read what another adapter has computed; marks the caches that it will fill.
    """
    found = [carrier for name, value in given for carrier in _carriers(name, value)]
    if found:
        rows, others = _rows(active, chosen), active.marked
        for carrier in found:
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
    parts = found if isinstance(found, tuple | list) else ()
    items = found.items() if isinstance(found, Mapping) else enumerate(parts)
    carriers = [carrier for name, value in items for carrier in _carriers(name, value)]
    rows = _rows(active, chosen) if carriers else ()
    for carrier in carriers:
        if isinstance(carrier, Tensor):
            _tensors[carrier] = Mark(rows)
            continue
        held = _held(carrier) if len(rows) > 1 else {}
        last = next((weakref.ref(t) for t in held.values()), None)
        with contextlib.suppress(AttributeError):  # of an object that takes no attribute
            mark = Mark(rows, {key: t.detach() for key, t in held.items()}, last)
            setattr(carrier, _MARK, mark)


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
        return name, active.stamp(name)
    return name, tuple(active.stamp(each) for each, _ in name)


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


def _held(cache: Any) -> dict[Any, Tensor]:
    """The tensors [rows, ...] by name that a cache has in its last layer with any: keys and values
    [rows, heads, tokens, width], or the states of a recurrent layer. Empty if it keeps them
    elsewhere.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    for layer in reversed(layers) if isinstance(layers, list) else (cache,):
        held = dict(tensors(getattr(layer, "__dict__", {})))
        found = {key: t for key, t in held.items() if t.dim() > 1 and t.numel()}
        if found:
            return found
    return {}


def _candidates(mark: Mark, cache: Any, rows: Sequence[Who]) -> list[set[Who]]:
    """Who may have computed each row of the cache."""
    if len(mark.rows) == 1:
        return [set(mark.rows)] * len(rows)
    now, n = _held(cache), len(mark.rows)
    moved = mark.last is None or all(mark.last() is not t for t in now.values())
    pairs = [_alike(t, mark.held[key]) for key, t in now.items() if key in mark.held]
    both = [pair for pair in pairs if pair is not None and len(pair[1]) == n]
    if not moved or not both:
        same = len(rows) in (1, n)
        return [{who} for who in mark.rows] if same else [set()] * len(rows)
    owners: dict[Any, set[Who]] = {}
    for who, bits in zip(
        mark.rows, zip(*(_bits(then) for _, then in both), strict=True), strict=True
    ):
        owners.setdefault(bits, set()).add(who)
    return [owners.get(bits, set()) for bits in zip(*(_bits(t) for t, _ in both), strict=True)]


def _alike(now: Tensor, then: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both tensors, of keys or values the tokens that both have; None if they cannot be compared."""
    if now.dtype != then.dtype or now.dim() != then.dim():
        return None
    if now.dim() == 4:
        tokens = min(now.shape[2], then.shape[2])
        now, then = now[:, :, :tokens], then[:, :, :tokens]
    return (now, then) if now.shape[1:] == then.shape[1:] else None


def _bits(t: Tensor) -> list[tuple[int, int]]:
    """Two numbers per row of t [rows, ...] that tell whether rows have the same bits."""
    return [digest(row) for row in t.detach()]


def _compare(mark: Mark, found: Sequence[set[Who]], rows: Sequence[Who]) -> None:
    """Raises WeftError unless each row of `rows` is among those found for it."""
    wanted = rows if len(rows) == len(found) else [*rows] * len(found)
    if len(wanted) == len(found) and all(w in f for w, f in zip(wanted, found, strict=True)):
        return
    gone = ""
    if _text(mark.rows) == _text(rows):
        gone = ", which was detached" if _attached(mark.rows) != _attached(rows) else _CHANGED
    raise WeftError(
        f"this key-value cache was filled under {_text(mark.rows)}{gone}, and now {_text(rows)} is active, which "
        "would read keys and values of other weights. Begin a new cache."
    )


def _attached(rows: Sequence[Who]) -> list[Any]:
    """Which attached adapters these are, whatever has changed in them since."""
    stamps = [(who[1],) if isinstance(who[0], str) else who[1] for who in rows if who is not None]
    return [[number for number, _ in each] for each in stamps]


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
