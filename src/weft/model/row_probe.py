"""Finds out once per kind and sizes of a call which layers carry the rows of the batch, and how.

The shape of a layer's input does not tell: [4, 4, width] may be rows and tokens, tokens and rows,
or images that belong to whichever rows. So the first call with one adapter per row runs the base on
inputs that differ in one row, and looks where the layers' inputs differ:

    values   other ids or other numbers in one row, then in another
    sizes    one row with a mask of one token, with padding, of zeros (an image that only pads the batch)
    ties     for layers that do not read the main input: nothing in the other inputs may decide which
             row of the batch a row of theirs belongs to

A layer whose rows are at one place in all of these has a `Layout`. Any other has the reason why its
rows cannot be told apart, and using it is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import philox
from .active import ActiveAdapters, PerRow
from .quiet_hooks import quiet
from .row_inputs import (
    Inputs,
    filled,
    is_mask,
    other_row,
    padded_row,
    repeated,
    short_row,
    tensors,
    zero_row,
)
from .row_layout import Layout, layouts
from .unchanged import unchanged

Found = Layout | str  # where the rows are, or why that is unknown
Told = (
    set[Layout] | str | None
)  # by one run: the layouts that explain it, why none does, or nothing
_UNSEEN = "it reads nothing that the batch has once per row"
_NOISE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest difference; others: 5e-2


class Recorder(PerRow):
    """Rows of the base that write down what each layer reads: one number per position."""

    def __init__(self, n: int) -> None:
        super().__init__([None] * n)
        self.differ = True
        self.seen: dict[nn.Module, list[Tensor]] = {}
        self.adapters: dict[nn.Module, frozenset[str]] = {}
        self.output: dict[Any, Tensor] = {}

    def see(self, module: nn.Module, layers: Iterable[str], x: Tensor, feature_dims: int) -> None:
        """Called with the input x [*positions, *features] of a module that has these adapters."""
        x, self.adapters[module] = x.detach(), frozenset(layers)
        self.seen.setdefault(module, []).append(_digest(x, feature_dims).cpu())


# The row of the batch that differs from the base's run, if it is one, and what the layers read.
Run = tuple[int | None, Recorder]


class Probe:
    """What one call does on inputs that differ in one row. `found`: the layout, or the reason, of
    each module that it reaches; `shapes`: the shapes of the positions that these had;
    `single`: see `Inputs.single`. `hooks`: whether the user's forward hooks run too.
    """

    def __init__(
        self, module: nn.Module, active: ActiveAdapters, inputs: Inputs, hooks: bool = False
    ) -> None:
        self._module, self._active, self._inputs = module, active, inputs
        self.single = inputs.single()
        self._empty_fails = False
        self._others: dict[int, Run | None] = {}  # by input: a run on other numbers in its row 1
        self._tied: dict[int, bool] = {}
        with unchanged(module), nullcontext() if hooks else quiet(module):
            self._base = self._run({})
            self._values, self._sizes = self._differences()
            self.found = {m: self._found(m) for m in self._base.seen}
        self.shapes = {m: {tuple(t.shape) for t in seen} for m, seen in self._base.seen.items()}
        self.adapters = self._base.adapters
        del self._base, self._values, self._sizes, self._others, self._inputs

    def _run(self, changes: Mapping[int, Any]) -> Recorder:
        recorder = Recorder(self._inputs.n)
        args, kwargs = self._inputs.changed(changes)
        with self._active.instead(recorder), torch.random.fork_rng(_devices(self._module)):
            out = self._module.forward(*args, **kwargs)
        for path, t in tensors(out):
            if t.dim() and t.shape[0] == self._inputs.n:
                recorder.output[path] = _digest(t.detach(), max(0, t.dim() - 1)).cpu()
        return recorder

    def _try(self, changes: Mapping[int, Any], row: int | None) -> Run | None:
        try:
            return row, self._run(changes)
        except Exception:  # of whatever model; what a run has not shown is not known
            return None

    def _differences(self) -> tuple[list[Run], list[Run]]:
        """Runs on other numbers in one row of the main input, and runs on rows of other sizes
        too.
        """
        if not self._inputs.rows:
            return [], []
        main = self._inputs.rows[0][1]
        values = [self._try({id(main): other_row(main, 1)}, 1)]
        lengths, others = self._sized(main)
        short = {id(t): short_row(t, 0) for t in lengths}
        sizes = [self._try({**short, id(main): other_row(main, 0)}, 0)] if short else []
        if not all(sizes):
            sizes.append(self._try(short, 0))
        if not all([*values, *sizes[:1]]) or not sizes:
            values.append(self._try({id(main): other_row(main, 0)}, 0))
        if main.is_floating_point():
            sizes.append(self._try({id(main): zero_row(main, 1)}, 1))
        elif main.dim() > 1:
            pad = getattr(getattr(self._module, "config", None), "pad_token_id", None)
            pad = pad if isinstance(pad, int) and pad >= 0 else 0
            sizes.append(self._try({id(main): padded_row(main, 1, pad)}, 1))
        if others:  # their rows may be no rows of the batch, so only shapes tell something
            empty = {id(t): short_row(t, 1) if is_mask(t) else zero_row(t, 1) for t in others}
            sizes.append(self._try(empty, None))
            self._empty_fails = sizes[-1] is None
        return [run for run in values if run], [run for run in sizes if run]

    def _sized(self, main: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs that say how long a row of the batch is, and others by which a layer may have
        more or fewer positions.
        """
        length = main.shape[1] if main.dim() > 1 else 0
        found: tuple[list[Tensor], list[Tensor]] = [], []
        for _, t in self._inputs.rows:
            number = t.dim() == 1 and not t.is_floating_point() and t.dtype != torch.bool
            if t is main:
                continue
            if number and bool(((t >= 1) & (t <= length)).all()):
                found[0].append(t)
            elif is_mask(t):
                found[t.shape[1:] != main.shape[1:2]].append(t)
            elif t.is_floating_point():
                found[1].append(t)
        return found

    def _found(self, module: nn.Module) -> Found:
        told = self._told(module, self._values)
        if not any(isinstance(one, set) for one in told):
            return self._of_another_input(module)
        return _agreed([*told, *self._told(module, self._sizes)])

    def _told(self, module: nn.Module, runs: Iterable[Run]) -> list[Told]:
        base, n = self._base.seen[module], self._inputs.n
        return [_where(base, run.seen.get(module), n, row) for row, run in runs]

    def _of_another_input(self, module: nn.Module) -> Found:
        """The layout of a layer that does not read the main input."""
        untried = []
        for path, t in sorted(self._inputs.rows[1:], key=lambda row: is_mask(row[1])):
            name = ".".join(map(str, path))
            if id(t) not in self._others:
                self._others[id(t)] = self._try({id(t): other_row(t, 1)}, 1)
            run = self._others[id(t)]
            if run is None:
                untried.append(name)
                continue
            told = self._told(module, [run])
            if told == [None]:
                continue
            if id(t) not in self._tied:
                self._tied[id(t)] = self._is_tied(t)
            if not self._tied[id(t)]:
                return (
                    f"it reads {name!r} and not the main input, and what the inputs hold decides "
                    f"which row of the batch a row of {name!r} belongs to"
                )
            return _agreed([*told, *self._told(module, self._sizes)])
        return _UNSEEN + (f", unless in {untried}, of which one row cannot vary" if untried else "")

    def _is_tied(self, t: Tensor) -> bool:
        """Whether row i of this input belongs to row i of the others, whatever they hold."""
        others = [o for _, o in self._inputs.rows if o is not t]
        if t.is_floating_point() and self._empty_fails:
            return False
        if self._try({id(others[0]): filled(others[0])}, 0) is None:
            return False
        same = {id(o): repeated(o) for o in others}
        first, second = self._try(same, 0), self._try({**same, id(t): other_row(t, 1)}, 1)
        if first is None or second is None:
            return False
        base, run = first[1].output, second[1].output
        if {k: v.shape for k, v in base.items()} != {k: v.shape for k, v in run.items()}:
            return False
        rows = [set(_differs(base[k], run[k]).nonzero()[:, 0].tolist()) for k in base]
        return {1} in rows and all(1 in found for found in rows if found)


def _where(base: Sequence[Tensor], run: Sequence[Tensor] | None, n: int, row: int | None) -> Told:
    """The layouts that explain where a layer's calls differ if one row does. None if they do not
    differ, and a reason if there can be none.
    """
    if run is None or len(run) != len(base):
        return "it is called or not, depending on what the rows hold"
    found: set[Layout] | None = None
    for before, after in zip(base, run, strict=True):
        if before.shape != after.shape:
            if before.dim() != after.dim():
                return "the shape of its input depends on what the rows hold"
            fits = {
                at
                for at in layouts(before.shape, n)
                if at.kind == "rows" and at.fits(after.shape, n)
            }
            if not fits:
                return (
                    f"the size of its input depends on what the rows hold: {tuple(before.shape)} "
                    f"and {tuple(after.shape)} positions"
                )
        elif row is not None:
            differs = _differs(before, after)
            if not bool(differs.any()):
                continue
            fits = {
                at
                for at in layouts(before.shape, n)
                if not bool((differs & ~at.owned(before.shape, n, row)).any())
            }
            if not fits:
                return (
                    f"one row of the batch changes other positions of its input than one place of "
                    f"{tuple(before.shape)} positions"
                )
        else:
            continue
        found = fits if found is None else found & fits
    return found


def _agreed(told: Iterable[Told]) -> Found:
    """The one layout that explains all runs, or the reason why there is none."""
    fits: set[Layout] | None = None
    for one in told:
        if isinstance(one, str):
            return one
        if one is not None:
            fits = one if fits is None else fits & one
    if fits is None:
        return _UNSEEN
    if len(fits) != 1:
        return "its rows are at no one place" if not fits else "its rows may be at several places"
    return next(iter(fits))


def _digest(x: Tensor, feature_dims: int) -> Tensor:
    """One number per position of x [*positions, *features]."""
    if not feature_dims:
        return x.double()
    flat = x.flatten(-feature_dims)
    if not flat.is_floating_point():
        flat = flat.double() if not flat.is_complex() else torch.view_as_real(flat).flatten(-2)
    v = philox.uniform(0x90B5, 0, 1, flat.shape[-1], 1.0, x.device)[0].to(flat.dtype)
    return torch.nn.functional.linear(flat, v[None])[..., 0]


def _differs(before: Tensor, after: Tensor) -> Tensor:
    """A mask of the positions that differ by more than rounding."""
    gap = (after.double() - before.double()).abs()
    odd = ~gap.isfinite() & (before.isfinite() | after.isfinite())
    noise = _NOISE.get(before.dtype, 5e-2)
    finite = gap[gap.isfinite()]
    most = finite.max() if finite.numel() else gap.new_zeros(())
    size = before[before.isfinite()].abs().double()
    if not size.numel() or bool(most <= 1e-2 * noise * size.max()):
        return odd
    return odd | (gap > noise * most)


def _devices(module: nn.Module) -> list[int]:
    return sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
