"""The inputs of a call with other numbers in one row: what a probe runs a model on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

Path = tuple[Any, ...]
_LEAST = -1e4  # of a mask that is added to the scores of attention: what hides a position


def tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yields the tensors [...] in nested containers, with the keys that lead to each."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors(part, (*path, key))
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from tensors(part, (*path, i))


def main_input(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Returns the input whose first dimension counts the rows: input_ids or inputs_embeds if
    present, else the first tensor. None if there is none, or only within other arguments.
    """
    named = [kwargs[k] for k in ("input_ids", "inputs_embeds") if isinstance(kwargs.get(k), Tensor)]
    plain = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
    found = named or plain
    return found[0] if found else None


class Inputs:
    """The inputs of one call, and those of its tensors that may have one row per row of the batch."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], n: int) -> None:
        self.all, self.n = (tuple(args), dict(kwargs)), n
        self._found = {id(t): (path[1:], t) for path, t in tensors(self.all)}
        self._named = [(p, t) for p, t in self._found.values() if t.dim() and t.shape[0] == n]

    @cached_property
    def rows(self) -> list[tuple[Path, Tensor]]:
        """The tensors whose first dimension is n, with their names: first the main input, which the
        layers read.
        """
        main = main_input(*self.all)
        if main is None or is_mask(main):
            main = next((t for _, t in self._named if not is_mask(t)), main)
        return sorted(self._named, key=lambda named: named[1] is not main)

    def is_empty(self) -> bool:
        """Whether there is nothing to run a model on."""
        return any(not t.numel() for _, t in self._named)

    def key(self) -> Any:
        """What all calls have in common that one probe may speak for, beside their sizes."""
        return _key(self.all, self.n)

    def sizes(self) -> Any:
        """The shapes and numbers of which a layout may depend. Of a step, not of what grows with
        every step.
        """
        step = self.is_step()
        shapes = [
            (path, tuple(t.shape))
            for path, t in self._found.values()
            if not (step and self._grows(path, t))
        ]
        return self.n, step, tuple(shapes), () if step else tuple(_numbers(self.all))

    def is_step(self) -> bool:
        """Whether the main input has one position per row, as when one token after another is
        decoded.
        """
        main = main_input(*self.all)
        return main is not None and main.dim() > 1 and main.shape[1] == 1

    def is_of_steps_only(self) -> bool:
        """Whether no input but what grows has more than one position per row either, so that a
        layer's input of n positions is the n rows.
        """
        return self.is_step() and all(
            t.dim() < 2 or t.shape[1] == 1 or self._grows(path, t) for path, t in self._named
        )

    def _grows(self, path: Path, t: Tensor) -> bool:
        """Whether a tensor is a mask [n, tokens], or keys and values [n, heads, tokens, ...] of
        earlier tokens.
        """
        return (t.dim() == 2 and t is not main_input(*self.all)) or (t.dim() > 3 and len(path) > 1)

    def single(self) -> frozenset[Path]:
        """The inputs whose second dimension is 1, where a layout may not show."""
        return frozenset(p for p, t in self._named if t.dim() > 1 and t.shape[1] == 1)

    def changed(self, changes: Mapping[int, Tensor] | None = None) -> tuple[Any, Any]:
        """Returns copies of (args, kwargs), to which a forward may write, with some tensors, by id,
        replaced.
        """
        memo: dict[int, Any] = {id(t): t.detach().clone() for _, t in self._found.values()}
        memo.update(changes or {})
        _keep(self.all, memo, set())
        found: tuple[Any, Any] = copy.deepcopy(self.all, memo)
        return found


def is_mask(t: Tensor) -> bool:
    """Whether a tensor [n, ...] says which positions count: 0 and 1, or 0 and a large negative."""
    if t.dtype == torch.bool:
        return True
    if t.dim() < 2:
        return False
    if t.is_floating_point():
        return bool(((t == 0) | (t == 1) | (t <= _LEAST)).all())
    return bool(((t == 0) | (t == 1)).all())


def other_row(t: Tensor, row: int) -> Tensor:
    """Returns t [n, ...] with other numbers in one row: ids that it has already, or noise."""
    found = t.detach().clone()
    if not t.numel():
        return found
    if t.is_floating_point() or t.is_complex():
        made = torch.randn(t[row].shape, generator=torch.Generator().manual_seed(11 + row))
        finite = t.detach()[t.isfinite()].abs().float()
        size = float(finite.mean()) if finite.numel() else 1.0
        found[row] = made.to(t) * (size or 1.0)
        return found
    if t.dtype == torch.bool:
        found[row] = ~found[row]
        return found
    own = found[row]
    for value in (*([own.roll(1, 0)] if own.dim() else []), *found):
        if not torch.equal(value, own):
            found[row] = value.clone()
            return found
    found[row] = own - 1 if bool((own > 0).all()) else own + 1
    return found


def zero_row(t: Tensor, row: int) -> Tensor:
    """Returns t [n, ...] with one row of zeros, as an image that only pads a batch is."""
    found = t.detach().clone()
    found[row] = 0
    return found


def padded_row(t: Tensor, row: int, pad: int) -> Tensor:
    """Returns ids [n, tokens, ...] in which the second half of one row is padding."""
    found = t.detach().clone()
    found[row, t.shape[1] // 2 :] = pad
    return found


def short_row(t: Tensor, row: int) -> Tensor:
    """Returns a mask [n, ..., tokens] in which one row has a single token, or lengths [n] likewise."""
    found = t.detach().clone()
    if t.dim() < 2:
        found[row] = 1
        return found
    hidden = torch.finfo(t.dtype).min if t.is_floating_point() and bool((t < 0).any()) else 0
    seen = found[row] if hidden == 0 else found[row] == 0
    right = bool(seen[..., 0].bool().all())  # padding, if any, is on the right
    if right:
        found[row, ..., 1:] = hidden
    else:
        found[row, ..., :-1] = hidden
    return found


def filled(t: Tensor) -> Tensor:
    """Returns t [n, ...] with one value everywhere: nothing in it can tell rows apart."""
    if t.is_floating_point():
        return torch.zeros_like(t)
    return t.detach()[:1].reshape(1, -1)[:, -1:].reshape([1] * t.dim()).expand_as(t).clone()


def repeated(t: Tensor) -> Tensor:
    """Returns t [n, ...] with its first row everywhere."""
    return t.detach()[:1].expand_as(t).clone()


def _key(value: Any, n: int) -> Any:
    if isinstance(value, Tensor):
        return value.dim(), value.is_floating_point(), value.dim() > 0 and value.shape[0] == n
    if isinstance(value, Mapping):
        return tuple((k, _key(v, n)) for k, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return tuple(_key(v, n) for v in value)
    if isinstance(value, bool | str) or value is None:
        return value
    return type(value)


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, int | float):
        yield value


def _keep(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Adds what must not be copied, and copies of tensors that `deepcopy` refuses."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, nn.Module) or callable(value):
        memo[id(value)] = value
    elif isinstance(value, Mapping):
        for part in value.values():
            _keep(part, memo, seen)
    elif isinstance(value, list | tuple):
        for part in value:
            _keep(part, memo, seen)
    if not isinstance(value, type) and hasattr(value, "__dict__"):
        for part in value.__dict__.values():
            _keep(part, memo, seen)
