"""Which layers carry the rows of the batch in the call that runs now, and how."""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError, WeftError
from ..ops.input_cache import runs
from .active import ROWS_FOUND, STATE, ActiveAdapters, PerRow
from .gate import COMPILED_CALL, calls
from .part_calls import of_this_call, token
from .row_inputs import Inputs, main_input
from .row_layout import Layout, of_single
from .row_probe import Found, Probe

_MOST = 256  # probes of one kind of call that are kept
_NO_CALL = (
    "no call of the model has shown yet where its rows are. Run the model once as it is, not compiled, "
    "with these rows"
)
Shapes = Collection[
    tuple[int, ...]
]  # that the positions of one layer had where its rows were found
_SEVERAL = "it has other rows in other calls, and this one is compiled or runs in backward"


class Table:
    """What is known of the layers in one call. `borrowed`: a probe of longer inputs has shown it,
    and the call has one token per row.
    """

    def __init__(self, found: Probe | str, borrowed: bool = False) -> None:
        self._found, self._borrowed = found, borrowed

    def of(self, module: nn.Module) -> tuple[Found | None, Shapes]:
        """Returns where the rows are in a layer's input, or why that is unknown, and in which
        shapes of its positions that was seen.
        """
        probe = self._found
        if isinstance(probe, str):
            return probe, ()
        return probe.found.get(module), () if self._borrowed else probe.shapes.get(module, ())

    def layout(self, module: nn.Module, positions: tuple[int, ...], n: int) -> Layout | str | None:
        """Returns where the n rows are in an input of these positions, or why that is unknown; None
        if they are not there.
        """
        found, shapes = self.of(module)
        if not isinstance(found, Layout):
            return found or "no probe has reached it"
        if positions in shapes or found.must_hold(positions, n):
            return found
        return of_single(positions, n) if self._borrowed else None


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
    if torch.compiler.is_compiling():
        found = _traced(module, positions, len(rows.names))
    elif torch._C._current_autograd_node() is not None:
        found = _recomputed(module, positions, len(rows.names))
    else:
        rows, table = _table(rows, active)
        found = table.layout(module, positions, len(rows.names))
    if isinstance(found, str):
        raise _refused(rows, {module: found})
    if found is not None:
        return rows, found
    raise WeftError(
        f"weft.use was given {len(rows.names)} names, one per row, but a layer received an input of shape "
        f"{tuple(x.shape)}, whose first dimension is not these rows, or has not been when the rows of "
        "inputs of these sizes were found. Give one name per row of the batch; with k beams repeat each "
        "name k times."
    )


def _recomputed(module: nn.Module, positions: tuple[int, ...], n: int) -> Layout | str | None:
    """The layout of a module that runs again in backward, as it was in a forward of these sizes."""
    known: Mapping[Found, set[Any]] = module.__dict__.get(ROWS_FOUND, {})
    seen = [found for found, shapes in known.items() if positions in shapes] or [*known]
    if len(seen) != 1:
        return _SEVERAL if seen else _NO_CALL
    found = seen[0]
    if isinstance(found, str) or positions in known[found] or found.must_hold(positions, n):
        return found
    return of_single(positions, n)


def _traced(module: nn.Module, positions: tuple[int, ...], n: int) -> Layout | str | None:
    """The layout of a module of a compiled model, for the sizes of this trace and no others."""
    found = _look_while_tracing(module)
    if isinstance(found, str):
        return found
    for dim, kind, shape in found:
        if positions == shape:
            return Layout(dim, kind)
    if len(found) and positions.count(n) == 1:
        dim, kind, _ = found[0]
        if kind == "rows" and dim < len(positions) and positions[dim] == n:
            return Layout(dim, kind)
    return None


def _look_while_tracing(module: nn.Module) -> tuple[tuple[int, str, tuple[int, ...]], ...] | str:
    """The layouts and shapes of a module of a model whose compiled forward is traced. Called by
    torch.compile itself and not traced, so the inputs are those of the call on this thread's stack.
    """
    known: Mapping[Found, Shapes] = module.__dict__.get(ROWS_FOUND, {})
    for root, args, kwargs in calls(COMPILED_CALL):
        root = root._modules.get("_orig_mod") or root
        state: Any = root.__dict__.get(STATE)
        choice = None if state is None else state.active.chosen()
        if choice is None or not isinstance(choice.active, PerRow):
            continue
        try:
            found, shapes = _known(root, state.active, choice.active, args, kwargs).of(module)
        except UnsupportedError as error:
            return str(error)
        known = {} if found is None else {found: shapes}
        break
    if len(known) != 1:
        return _SEVERAL if known else _NO_CALL
    [(layout, shapes)] = known.items()
    if isinstance(layout, str):
        return layout
    return tuple((layout.dim, layout.kind, shape) for shape in shapes)


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
    held = of_this_call(active)
    asked = token(rows)
    if held.found is not None and held.found[0] == asked:
        return held.found[1] or rows, held.found[2]
    given = held.frame.f_locals
    part, args, kwargs = given["self"], given["args"], given["kwargs"]
    main, here = main_input(args, kwargs), rows
    if main is not None and main.dim() and main.shape[0] != len(rows.names):
        here = _of_prompts(rows, root, part, main)
    found: Table = _eagerly(_known, part, active, here, args, kwargs)
    held.found = asked, None if here is rows else here, found
    return here, found


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
        return Table("its input is empty")
    probes = active.probes.setdefault(module, {}).setdefault(inputs.key(), {})
    sizes = inputs.sizes()
    probe, borrowed = probes.get(sizes), False
    if probe is None and inputs.is_of_steps_only():
        single = inputs.single()
        probe = next((p for p in [*probes.values()] if p.single <= single), None)
        borrowed = probe is not None
    if probe is None:
        try:
            probe = _eagerly(_probe, module, active, inputs)
        except Exception as error:  # of whatever model: its own forward raises it again
            return Table(f"running the base on this input raised {type(error).__name__}: {error}")
        _keep(probes, sizes, probe)
    bad = {
        layer: found
        for layer, found in probe.found.items()
        if isinstance(found, str) and not probe.adapters[layer].isdisjoint(rows.groups)
    }
    if bad:
        raise _refused(rows, bad)
    return Table(probe, borrowed)


def _probe(module: nn.Module, active: ActiveAdapters, inputs: Inputs) -> Probe:
    """Looks where the rows are, with the user's hooks only if the model does not run without them."""
    try:
        return Probe(module, active, inputs)
    except Exception:
        return Probe(module, active, inputs, hooks=True)


def _keep(probes: dict[Any, Probe], sizes: Any, probe: Probe) -> None:
    """Keeps a probe, and notes on each layer what it has shown."""
    for old in [*probes][: 1 - _MOST]:
        probes.pop(old, None)  # another thread may have done so
    probes[sizes] = probe
    for layer, found in probe.found.items():
        known = layer.__dict__.get(ROWS_FOUND, {})
        shapes = known.get(found, frozenset()) | probe.shapes[layer]
        layer.__dict__[ROWS_FOUND] = {**known, found: shapes}


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
