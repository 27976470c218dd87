"""`weft.use`: which adapter answers, for the whole batch or row by row."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import nn

from ..errors import MergeError, UnsupportedError, WeftError
from ..ops.input_cache import forget_ended
from . import fallback
from .active import NO_TASK, Active, ActiveAdapters, PerRow, caller
from .generator_block import Block, generator_frame
from .state import State, own_blocks, state_of

_counting = threading.Lock()
_NO_ROWS = (bytes, Mapping, set, frozenset)  # iterable, and without an order or names
Which = str | Sequence[str | None] | None


class use:  # noqa: N801 - reads as a verb, like torch.no_grad
    """Makes the base (None), one adapter (its name), or one per row of the batch (a list of names and
    None) active for the caller: the current thread, or asyncio task.

    As a context manager it restores the previous selection; called as a statement it stays. In a
    generator the block is the generator's: while it is paused at a yield, a forward of its consumer
    raises WeftError unless the consumer chooses for itself. A thread that has not called it runs the
    adapter that was attached last. Rows may mix methods and
    ranks; each row gets the output of its own adapter. With k beams or k samples per prompt, repeat
    each name k times.

    Raises, before any compute: WeftError (unknown name, empty or nested list), MergeError (an adapter is merged),
    UnsupportedError (per-row use of an adapter that trains base tensors or adapts routed experts).
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
        with _counting:
            self._state.open.update(names)
        active, frame = self._state.active, generator_frame()
        block = None
        if frame is not None:
            block = active.blocks.setdefault(frame, Block(frame, self._before))
        self._state.choose(self._chosen, own_blocks(self._before) + len(names), block)
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
        with _counting:
            state.open.subtract(self._names)
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
    given: Any = which
    if not hasattr(given, "__iter__") or isinstance(given, _NO_ROWS):
        raise WeftError(
            f"weft.use(model, {which!r}): give an adapter's name, None for the base, or a list with "
            "one name or None per row of the batch, in the order of the rows."
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


def check_not_in_use(state: State, name: str) -> None:
    """Raises WeftError if an open `with weft.use(...)` block, of any caller, uses this adapter."""
    if state.open[name] > 0:
        raise WeftError(
            f"adapter {name!r} is used by an open `with weft.use(...)`, of this or another thread "
            "or task. Leave the block first."
        )


def check_alone(state: State, what: str) -> None:
    """Raises MergeError if another caller has an open `with weft.use(...)` block on this model."""
    if sum(state.open.values()) > own_blocks(state.active.chosen()):
        raise MergeError(
            f"cannot {what}: another thread or task is inside `with weft.use(...)` of this model, "
            "and its answers would change on the way. Wait until it has left the block."
        )


def _names(active: Active) -> tuple[str | None, ...]:
    """Returns the names that an open block counts: its adapter or the base, or each adapter of its
    rows.
    """
    return (active,) if not isinstance(active, PerRow) else tuple(active.groups) or (None,)


def _check_row(state: State, name: Any) -> None:
    adapter = state.adapter(name)
    if adapter.selected_tensors:
        raise UnsupportedError(
            f"adapter {name!r} trains base tensors ({next(iter(adapter.selected_tensors))!r}, ...), "
            "which all rows of a batch share. Run its rows in a batch of their own."
        )
    if not adapter.config.by_row:
        raise UnsupportedError(
            f"adapter {name!r} ({type(adapter.config).__name__}) adds tokens to the input, and all "
            "rows of a batch have one length. Run its rows in a batch of their own."
        )
    if adapter.routed:
        raise UnsupportedError(
            f"adapter {name!r} adapts {adapter.routed[0]!r}, where a router has regrouped the tokens "
            "and rows of the batch can no longer be told apart. Run its rows in a batch of their "
            "own."
        )


def _check_batch_first(root: nn.Module) -> None:
    for name, module in root.named_modules():
        if getattr(module, "batch_first", True) is False:
            raise UnsupportedError(
                f"{name or type(root).__name__!r} has batch_first=False, so a layer's first "
                "dimension is no row of the batch, and rows would be mixed up. Build it with "
                "batch_first=True."
            )
