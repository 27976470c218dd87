"""Which layers carry the rows of the batch in the call that runs now, and how."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError, WeftError
from ..ops.input_cache import runs
from .active import ROWS_FOUND, STATE, ActiveAdapters, PerRow
from .gate import COMPILED_CALL, calls
from .row_inputs import Inputs, main_input
from .row_layout import Layout
from .row_probe import Found, Probe

Table = Mapping[nn.Module, Found]
_NO_CALL = (
    "no call of the model has shown yet where its rows are. Run the model once as it is, not compiled, "
    "with these rows"
)


class _Unknown(dict[nn.Module, Found]):
    """The same reason for every layer."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self._reason = reason

    def get(self, module: nn.Module, default: Any = None) -> Any:
        """Returns the reason."""
        return self._reason


class _Calls(threading.local):
    """What is known of the calls of models that this thread is inside of, innermost last."""

    def __init__(self) -> None:
        self.open: list[tuple[Any, Table | None]] = []  # with the frame of the call


_calls = _Calls()


def begin(
    call: Any, root: nn.Module, active: ActiveAdapters, rows: PerRow | None, *given: Any
) -> None:
    """Called before a forward of the root, with the frame of its call, the caller's rows, and the
    args and kwargs. Raises UnsupportedError if a layer of these rows' adapters has rows that cannot
    be told apart.
    """
    table = _known(root, active, rows, *given) if rows is not None and rows.differ else None
    _calls.open.append((call, table))


def end(call: Any) -> None:
    """Called after a forward of the root; does nothing if that call did not begin."""
    place = next((i for i, (c, _) in enumerate(_calls.open) if c is call), None)
    if place is not None:
        del _calls.open[place:]


def layout_of(
    rows: PerRow, active: ActiveAdapters, module: nn.Module, x: Tensor, feature_dims: int
) -> tuple[PerRow, Layout]:
    """Returns the rows of an adapted module's input x [*positions, features], and where they are.

    Raises WeftError if that is not known, or x does not have that many rows.
    """
    positions = tuple(x.shape[: x.dim() - feature_dims])
    if torch.compiler.is_compiling() or torch._C._current_autograd_node() is not None:
        found: Found | None = _only_layout(module)
    else:
        rows, table = _table(rows, active)
        found = table.get(module)
    n = len(rows.names)
    if found is None or isinstance(found, str):
        raise _refused(rows, {module: found or "no probe has reached it"})
    if len(positions) > found.dim and found.fits(positions, n):
        return rows, found
    if positions.count(n) == 1 and all(size in (1, n) for size in positions):
        return rows, Layout(positions.index(n), "rows")  # one token per row, in less dimensions
    raise WeftError(
        f"weft.use was given {n} names, one per row, but a layer received an input of shape "
        f"{tuple(x.shape)}, whose first dimension is not these rows. Give one name per row of the "
        "batch; with k beams repeat each name k times."
    )


def _only_layout(module: nn.Module) -> Found:
    """The layout of a module that runs outside the call that was probed: in a compiled model, or in
    backward again.
    """
    found: tuple[Found, ...] = module.__dict__.get(ROWS_FOUND, ())
    if len(found) == 1:
        return found[0]
    if found:
        return "it has other rows in other calls, and this one is compiled or runs in backward"
    traced = _look_while_tracing(module) if torch.compiler.is_compiling() else _NO_CALL
    return traced if isinstance(traced, str) else Layout(*traced)


def _look_while_tracing(module: nn.Module) -> tuple[int, str] | str:
    """The layout of a module of a model whose compiled forward is traced for the first time. Called
    by torch.compile itself and not traced, so the inputs are those of the call on this thread's
    stack.
    """
    for root, args, kwargs in calls(COMPILED_CALL):
        root = root._modules.get("_orig_mod") or root
        state: Any = root.__dict__.get(STATE)
        choice = None if state is None else state.active.chosen()
        if choice is None or not isinstance(choice.active, PerRow):
            continue
        try:
            found = _known(root, state.active, choice.active, args, kwargs).get(module)
        except UnsupportedError as error:
            return str(error)
        return (found.dim, found.kind) if isinstance(found, Layout) else found or _NO_CALL
    return _NO_CALL


_look_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _table(rows: PerRow, active: ActiveAdapters) -> tuple[PerRow, Table]:
    """What is known of the call that runs: of the root, or of a part of it that is called alone."""
    while _calls.open and not runs(_calls.open[-1][0]):
        _calls.open.pop()  # an interrupt has ended it
    table = _calls.open[-1][1] if _calls.open else None
    if table is not None:
        return rows, table
    root = None if rows.root is None else rows.root()
    if root is None:
        raise WeftError("these rows were chosen for another model. Choose them again: weft.use.")
    if rows.parts is None:
        rows.parts = weakref.WeakSet(root.modules())
    part, args, kwargs = [call for call in calls() if call[0] in rows.parts][-1]
    main = main_input(args, kwargs)
    if main is not None and main.dim() and main.shape[0] != len(rows.names):
        rows = _of_prompts(rows, root, part, main)
    found: Table = _eagerly(_known, part, active, rows, args, kwargs)
    return rows, found


def _of_prompts(rows: PerRow, root: nn.Module, part: nn.Module, main: Tensor) -> PerRow:
    """The rows of an encoder's input: `generate` runs it on the prompts before it repeats them for
    their beams or samples. Raises WeftError if those of one prompt have several adapters.
    """
    n, m = len(rows.names), main.shape[0]
    names = rows.names[:: n // m] if m and n % m == 0 else ()
    encoder = encoder_of(root)
    if part is encoder and tuple(name for name in names for _ in range(n // m)) == rows.names:
        return PerRow(names, root)
    beams = f"the {n // m} beams or samples of one prompt" if names and part is encoder else "rows"
    raise WeftError(
        f"weft.use was given {n} names, one per row, but {type(part).__name__} received an input of "
        f"shape {tuple(main.shape)}, whose first dimension is not these {beams}. Give one name per "
        "row of the batch; with k beams repeat each name k times, one after another."
    )


def encoder_of(root: nn.Module) -> nn.Module | None:
    """Returns the encoder of a transformers encoder-decoder; None for any other model."""
    if not getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        return None
    found = getattr(root, "get_encoder", lambda: None)()
    return found if isinstance(found, nn.Module) and found is not root else None


def _known(
    module: nn.Module,
    active: ActiveAdapters,
    rows: PerRow,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Table:
    """What is known of this call of a module. Raises UnsupportedError as `begin`."""
    inputs = Inputs(args, kwargs, len(rows.names))
    if inputs.is_empty():
        return _Unknown("its input is empty")
    probes: list[Probe] = active.probes.setdefault(module, {}).setdefault(inputs.key(), [])
    single = inputs.single()
    probe = next((p for p in probes if p.single <= single), None)
    if probe is None:
        try:
            probe = _eagerly(Probe, module, active, inputs)
        except Exception as error:  # of whatever model: its own forward raises it again
            return _Unknown(
                f"running the base on this input raised {type(error).__name__}: {error}"
            )
        probes.append(probe)
        for layer, found in probe.found.items():
            known = layer.__dict__.get(ROWS_FOUND, ())
            layer.__dict__[ROWS_FOUND] = (*known, *({found} - set(known)))
    bad = {
        layer: found
        for layer, found in probe.found.items()
        if isinstance(found, str) and not probe.adapters[layer].isdisjoint(rows.groups)
    }
    if bad:
        raise _refused(rows, bad)
    return probe.found


def _eagerly(make: Any, *given: Any) -> Any:
    """Returns make(*given), of which torch.compile, if it is in use, compiles nothing."""
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        return torch.compiler.disable(make)(*given)  # type: ignore[no-untyped-call]
    return make(*given)


def _refused(rows: PerRow, bad: Mapping[nn.Module, str]) -> WeftError:
    root = None if rows.root is None else rows.root()
    names = {m: name for name, m in root.named_modules()} if root is not None else {}
    first, reason = next(iter(bad.items()))
    more = f" (and {len(bad) - 1} more layers)" if len(bad) > 1 else ""
    return UnsupportedError(
        f"weft.use was given {len(rows.names)} names, one per row, but "
        f"{names.get(first, type(first).__name__)!r}{more} has an input whose first dimension is not "
        f"these rows, and they are at no other known place: {reason}. Run each adapter's rows in a "
        "batch of their own, or attach the adapters without this layer."
    )
