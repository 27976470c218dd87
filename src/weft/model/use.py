"""`weft.use`: which adapter answers, for the whole batch or row by row, or several with
strengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import nn

from ..errors import ConfigError, MergeError, UnsupportedError, WeftError
from ..methods.base import LowRankMethod
from ..ops.input_cache import forget_ended
from . import fallback
from .active import NO_TASK, Active, ActiveAdapters, PerRow, Weighted, caller, names_of
from .adapter import Adapter
from .generator_block import Block, generator_frame
from .state import State, own_blocks, state_of

_NO_ROWS = (bytes, set, frozenset)  # iterable, and without an order or names
Which = str | Sequence[str | None] | Mapping[str, float] | None


class use:  # noqa: N801 - reads as a verb, like torch.no_grad
    """Makes the base (None), one adapter (its name), one per row of the batch (a list of names and
    None), or several with strengths (a dict) active for the caller: the current thread, or asyncio
    task.

    As a context manager it restores the previous selection; called as a statement it stays. In a
    generator the block is the generator's: while it is paused at a yield, a forward of its consumer
    raises WeftError unless the consumer chooses for itself. A thread that has not called it runs
    the adapter that was attached last. Rows may mix methods and
    ranks; each row gets the output of its own adapter. With k beams or k samples per prompt, repeat
    each name k times. With {"a": 0.7, "b": 0.3} every layer's output is y + Σ w (adapter(x) - y),
    where y = W x + bias is the layer's own; gradients reach all of these adapters.

    Raises, before any compute: WeftError (unknown name, empty or nested list, empty dict),
    ConfigError (a strength is not a finite number), MergeError (an adapter is merged),
    UnsupportedError (per-row use of an adapter that trains base tensors or adapts routed experts;
    strengths of one that trains base tensors or rows of new tokens, or is not of low rank).
    """

    def __init__(self, model: nn.Module, which: Which) -> None:
        fallback.refresh()
        forget_ended()
        self._state = state_of(model)
        if self._state.active.was_traced and caller()[1] != NO_TASK:
            raise UnsupportedError(
                "weft.use in an asyncio task of a compiled model: torch.compile follows the thread's "
                "choice, not the task's. Use the model uncompiled, or a thread per adapter."
            )
        self._before = self._state.active.chosen()
        self._chosen = checked(self._state, which)
        self._state.choose(self._chosen)

    def __enter__(self) -> None:
        names = self._names = _names(self._chosen)
        before = own_blocks(self._before)
        active, frame = self._state.active, generator_frame()
        try:
            self._state.open.enter(names, nested=before > 0 or self._state.gate.is_inside())
        except WeftError:
            active.restore(self._before)
            raise
        block = None
        if frame is not None:
            block = active.blocks.setdefault(frame, Block(frame, self._before))
        self._state.choose(self._chosen, before + len(names), block)
        self._block = block
        if block is not None:
            block.depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        state = self._state
        state.open.leave(self._names)
        self._leave(state.active)
        state.install_for_caller()

    def _leave(self, active: ActiveAdapters) -> None:
        active.restore(self._before)
        block = self._block
        if block is not None:
            block.depth -= 1
            if not block.depth:
                active.blocks.pop(block.frame, None)
                block.close()


def checked(state: State, which: Which) -> Active:
    """Returns the selection of `use`, validated. Raises as `use` does."""
    if state.merged is not None and which != state.merged.name:
        raise MergeError(
            f"adapter {state.merged.name!r} is merged into the weights, so {which!r} cannot be "
            "switched on. Call weft.unmerge(model) first."
        )
    if which is None:
        return None
    if isinstance(which, str):
        state.adapter(which)
        return which
    if isinstance(which, Mapping):
        return Weighted(checked_strengths(state, which, "weft.use"))
    given: Any = which
    if not hasattr(given, "__iter__") or isinstance(given, _NO_ROWS):
        raise WeftError(
            f"weft.use(model, {which!r}): give an adapter's name, None for the base, a list with "
            "one name or None per row of the batch, in the order of the rows, or a dict of names "
            "and strengths."
        )
    names: list[Any] = list(which)  # of whatever the caller has put in
    if not names:
        raise WeftError("weft.use(model, []): give one name or None per row of the batch.")
    nested = next((n for n in names if isinstance(n, list | tuple | set | dict)), None)
    if nested is not None:
        raise WeftError(
            f"weft.use(model, [..., {nested!r}, ...]): no adapter is named {nested!r}. A row has one "
            "adapter: give one name or None per row of the batch."
        )
    passed: set[str | None] = {None}
    for name in names:
        if not isinstance(name, str | None) or name not in passed:
            _check_row(state, name)
            passed.add(name)
    _check_batch_first(state.root)
    return PerRow(names, state.root)


def checked_strengths(state: State, given: Mapping[Any, Any], call: str) -> dict[str, float]:
    """Returns adapters and strengths, validated. `call` is the name of the function, for messages.

    Raises WeftError (none, or an unknown name), ConfigError (a strength is not a finite number),
    UnsupportedError (an adapter is no update of low rank, or trains base tensors or rows of new
    tokens).
    """
    if not given:
        raise WeftError(
            f"{call}(model, {{}}): give adapters and strengths, for example {{'a': 0.5}}."
        )
    for name, strength in given.items():
        adapter = state.adapter(name)
        number = isinstance(strength, int | float) and not isinstance(strength, bool)
        if not number or not math.isfinite(strength):
            raise ConfigError(
                f"{call}: the strength of {name!r} is {strength!r}; write a finite number."
            )
        reason = _why_no_sum(adapter)
        if reason is not None:
            raise UnsupportedError(
                f"{call}: adapter {name!r} ({type(adapter.config).__name__}) {reason}, so it has no "
                "weighted sum with others."
            )
    return {name: float(strength) for name, strength in given.items()}


def _why_no_sum(adapter: Adapter) -> str | None:
    if adapter.selected_tensors:
        return f"trains base tensors ({next(iter(adapter.selected_tensors))!r}, ...)"
    if adapter.token_layers:
        return "trains rows of new tokens"
    if not isinstance(adapter.config, LowRankMethod):
        return "is not a low-rank change of weights"
    return None


def check_not_in_use(state: State, name: str) -> None:
    """Raises WeftError if an open `with weft.use(...)` block, of any caller, uses this adapter."""
    if state.open.of(name) > 0:
        raise WeftError(
            f"adapter {name!r} is used by an open `with weft.use(...)`, of this or another thread "
            "or task. Leave the block first."
        )


def check_alone(state: State, what: str) -> None:
    """Raises MergeError if another caller has an open `with weft.use(...)` block on this model."""
    if state.open.all() > own_blocks(state.active.chosen()):
        raise MergeError(
            f"cannot {what}: another thread or task is inside `with weft.use(...)` of this model, "
            "and its answers would change on the way. Wait until it has left the block."
        )


def _names(active: Active) -> tuple[str | None, ...]:
    """Returns the names that an open block counts: its adapters, or the base."""
    return names_of(active) or (None,)


def check_as_able(active: ActiveAdapters, new: Adapter, old: Adapter) -> None:
    """Raises UnsupportedError if a caller has chosen `old` in a way that `new` does not work in: as
    one of the rows of a batch, or with a strength.
    """
    for how, kind, why_not in (
        ("by row", PerRow, _why_no_row),
        ("with strengths", Weighted, _why_no_sum),
    ):
        reason = why_not(new)
        if reason is not None and active.in_use(kind, old.name):
            raise UnsupportedError(
                f"replace: the new adapter {new.name!r} ({type(new.config).__name__}) {reason}, and the "
                f"old one is in use {how}. Choose another first (weft.use), or load it under another name."
            )


def _check_row(state: State, name: Any) -> None:
    adapter = state.adapter(name)
    reason = _why_no_row(adapter)
    if reason is not None:
        raise UnsupportedError(f"adapter {name!r} {reason}. Run its rows in a batch of their own.")


def _why_no_row(adapter: Adapter) -> str | None:
    if adapter.selected_tensors:
        first = next(iter(adapter.selected_tensors))
        return f"trains base tensors ({first!r}, ...), which all rows of a batch share"
    if not adapter.config.by_row:
        return "adds tokens to the input, and all rows of a batch have one length"
    if adapter.routed:
        return (
            f"adapts {adapter.routed[0]!r}, where a router has regrouped the tokens and rows of the "
            "batch can no longer be told apart"
        )
    return None


def _check_batch_first(root: nn.Module) -> None:
    for name, module in root.named_modules():
        if getattr(module, "batch_first", True) is False:
            raise UnsupportedError(
                f"{name or type(root).__name__!r} has batch_first=False, so a layer's first "
                "dimension is no row of the batch, and rows would be mixed up. Build it with "
                "batch_first=True."
            )
