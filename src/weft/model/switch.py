"""`weft.use`: which adapter answers, for the whole batch or row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ..errors import MergeError, UnsupportedError, WeftError
from .state import Rows, State, state_of

Which = str | Sequence[str | None] | None


class use:  # noqa: N801 - reads as a verb, like torch.no_grad
    """Make the base (None), one adapter (its name), or one a row of the batch (a list of names and
    None) active.

    As a context manager it puts back what was active before; called as a statement it stays. Rows
    may mix methods and ranks; each row gets what its own adapter alone would give. With k beams or
    k samples a prompt, repeat each name k times.

    Raises, before any compute: WeftError (unknown name, empty list), MergeError (an adapter is
    merged), UnsupportedError (per-row use of an adapter that trains base tensors or adapts routed
    experts).
    """

    def __init__(self, model: nn.Module, which: Which) -> None:
        self._state = state_of(model)
        self._before = self._state.switch.active
        chosen = checked(self._state, which)
        if (
            self._state.merged is None
        ):  # a merged adapter answers from the weights; switched on too it would count twice
            activate(self._state, chosen)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._state.merged is None:
            activate(self._state, self._before)


def checked(state: State, which: Which) -> str | Rows | None:
    """Validate what `use` was asked for."""
    if state.merged is not None and which != state.merged.name:
        raise MergeError(
            f"adapter {state.merged.name!r} is merged into the weights, so {which!r} cannot be "
            "switched on. "
            "Call weft.unmerge(model) first."
        )
    if which is None:
        return None
    if isinstance(which, str):
        state.adapter(which)
        return which
    names = list(which)
    if not names:
        raise WeftError("weft.use(model, []): give one name or None per row of the batch.")
    for name in dict.fromkeys(names):
        if name is not None:
            _check_row(state, name)
    _check_batch_first(state.root)
    return Rows(names)


def _check_row(state: State, name: str) -> None:
    adapter = state.adapter(name)
    if adapter.selected_tensors:
        raise UnsupportedError(
            f"adapter {name!r} trains base tensors ({next(iter(adapter.selected_tensors))!r}, "
            "...), "
            "which all rows of a batch share. Run its rows in a batch of their own."
        )
    if not getattr(adapter.config, "by_row", True):
        raise UnsupportedError(
            f"adapter {name!r} ({type(adapter.config).__name__}) adds tokens to the input, and all "
            "rows "
            "of a batch have one length. Run its rows in a batch of their own."
        )
    if adapter.routed:
        raise UnsupportedError(
            f"adapter {name!r} adapts {adapter.routed[0]!r}, where a router has regrouped the "
            "tokens "
            "and rows of the batch can no longer be told apart. Run its rows in a batch of their "
            "own."
        )


def _check_batch_first(root: nn.Module) -> None:
    for name, module in root.named_modules():
        if getattr(module, "batch_first", True) is False:
            raise UnsupportedError(
                f"{name or type(root).__name__!r} has batch_first=False, so a layer's first "
                "dimension is "
                "no row of the batch, and rows would be mixed up. Build it with batch_first=True."
            )


def activate(state: State, active: str | Rows | None) -> None:
    """Set what is active, install the selected tensors that go with it, and watch the batch size if
    it is per row.
    """
    before = state.switch.active
    if isinstance(before, str) and before in state.adapters and before != active:
        for selected in state.adapters[before].selected_tensors.values():
            selected.install(selected.original)
            for layer in selected.layers():
                state.switch.base_weights.pop(layer, None)
    if isinstance(active, str) and before != active:
        for selected in state.adapters[active].selected_tensors.values():
            selected.install(selected.trained)
            state.switch.base_weights |= dict.fromkeys(selected.layers(), selected.original)
    if state.row_check is not None:
        state.row_check.remove()
        state.row_check = None
    if isinstance(active, Rows):
        state.row_check = state.root.register_forward_pre_hook(
            _row_check(len(active.names)), with_kwargs=True
        )
    state.switch.turn(active)


@contextmanager
def base_only(state: State | None) -> Iterator[None]:
    """The pretrained tensors in their places, whatever is active; puts back what was."""
    if state is None:
        yield
        return
    before = state.switch.active
    activate(state, None)
    try:
        yield
    finally:
        activate(state, before)


def _row_check(rows: int) -> Any:
    def check(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        batch = _batch(args, kwargs)
        if batch is not None and batch != rows:
            raise WeftError(
                f"weft.use was given {rows} names, one per row, but the batch has {batch} rows. "
                "Give one "
                "name per row; with k beams or samples a prompt, repeat each name k times."
            )

    return check


def _batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Rows of the model's input: of input_ids or inputs_embeds where there are any, else of the
    first tensor.
    """
    named = [kwargs[k] for k in ("input_ids", "inputs_embeds") if isinstance(kwargs.get(k), Tensor)]
    tensors = named or [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
    return int(tensors[0].shape[0]) if tensors else None
