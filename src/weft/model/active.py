"""Which adapter is active, for each caller: one object per model, which every adapted layer reads.

The choice of `weft.use` belongs to the calling thread or asyncio task (a context variable). A
caller that has chosen nothing gets the model's default, the adapter that was attached last.

Gradient checkpointing runs a forward again inside backward, in whatever thread and under whatever
choice backward runs. So the choice of the forward is written on torch's own record of the checkpointed
region (its frame, or the node of the reentrant kind), where the recomputation finds it.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from ..errors import WeftError

_keys = itertools.count()
_RECORD = "_weft_active"
_node = torch._C._current_autograd_node
_task = torch._C._current_graph_task_id
_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_UNPACK = "unpack_hook"  # the function of torch.utils.checkpoint that recomputes


class PerRow:
    """One adapter name (or None for the base) per row of the batch, grouped by adapter."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        distinct = dict.fromkeys(n for n in names if n is not None)
        self.groups = {n: [i for i, m in enumerate(names) if m == n] for n in distinct}

    def index(self, name: str, rows: int, device: torch.device) -> Tensor:
        """Returns [n] indices: the rows of a layer's first dimension that belong to adapter `name`.

        Flattened tokens give several such rows per row of the batch.
        """
        span = rows // len(self.names)
        first = torch.tensor(self.groups[name], device=device)[:, None] * span
        return (first + torch.arange(span, device=device)).reshape(-1)

    def check(self, x: Tensor, feature_dims: int) -> None:
        """Raises WeftError unless x is [batch, ...] or, flattened, [batch x tokens, in]."""
        n, have = len(self.names), x.shape[0] if x.dim() > feature_dims else 0
        # Ids in one dimension are as likely positions as tokens, so those must be the batch itself.
        flat = feature_dims > 0 and x.dim() == feature_dims + 1 and have % n == 0
        if have != n and not flat:
            raise WeftError(
                f"weft.use was given {n} names, one per row, but a layer received an input of shape "
                f"{tuple(x.shape)}, whose first dimension is not these rows. Give one name per row "
                "of the batch; with k beams repeat each name k times."
            )


Active = str | PerRow | None


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """The selection of one caller, the checkpointed region and the backward pass in which it did,
    and how many `with weft.use(...)` blocks of this caller are open.
    """

    active: Active
    region: Any
    task: int
    open: int


_choices: ContextVar[Mapping[int, Choice]] = ContextVar("weft_choices", default={})  # noqa: B039 - never written to


class _Traced(threading.local):
    """This thread's choice again, as an attribute: torch.compile cannot read a context variable."""

    def __init__(self) -> None:
        self.choice: Choice | None = None


class ActiveAdapters:
    """The active adapter or rows of one model. A copy starts with the choice of its creator as
    default.
    """

    def __init__(self, default: Active = None) -> None:
        self.key = next(_keys)
        self.default = default
        self.merged: str | None = None  # the adapter that is in the weights; then all are off
        self.base_weights: dict[nn.Module, Tensor] = {}  # layer -> its own weight while replaced
        self.several = False  # whether more than one has ever been active
        self.traced = _Traced()

    def __getstate__(self) -> dict[str, Any]:
        choice = self.chosen()
        default = self.default if choice is None else choice.active
        return {"default": default, "merged": self.merged, "base_weights": self.base_weights}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["default"])  # type: ignore[misc]
        self.merged, self.base_weights = state["merged"], state["base_weights"]

    def current(self, checkpointed: bool = False) -> Active:
        """Returns the selection that is active for this caller, or was in the forward that is being
        recomputed.

        `checkpointed`: without gradients, this may be the first forward of a reentrant checkpoint.
        """
        if self.merged is not None:
            return None
        if torch.compiler.is_compiling():
            traced = self.traced.choice
            return self.default if traced is None else traced.active
        choice = _choices.get().get(self.key)
        active = self.default if choice is None else choice.active
        if torch.is_grad_enabled():
            if _node() is not None:
                return self._of_the_forward(choice, active)
            if _hooks(True) is not None:
                self._record(_region(), choice, active)
        elif checkpointed:
            self._record(_reentrant_region(), choice, active)
        return active

    def chosen(self) -> Choice | None:
        """Returns the choice of this caller, or None."""
        return _choices.get().get(self.key)

    def choose(self, active: Active, open_blocks: int) -> None:
        """Makes this active for the caller."""
        self.several = self.several or active != self.default
        region = _region() if torch.is_grad_enabled() and _hooks(True) is not None else None
        self.restore(Choice(active, region, _task(), open_blocks))

    def restore(self, choice: Choice | None) -> None:
        """Restores the choice that `chosen` returned."""
        others = {k: v for k, v in _choices.get().items() if k != self.key}
        _choices.set(others if choice is None else {**others, self.key: choice})
        self.traced.choice = choice

    def set_default(self, active: Active) -> None:
        """Makes this active for every caller without a choice of its own."""
        self.several = self.several or (self.default is not None and active != self.default)
        self.default = active

    def _record(self, region: Any, choice: Choice | None, active: Active) -> None:
        """Records the active selection on a checkpointed region, unless the region itself chose it."""
        if region is None or (choice is not None and choice.region is region):
            return
        record = getattr(region, _RECORD, None)
        if record is None:
            record = {}
            setattr(region, _RECORD, record)
        record.setdefault(self.key, active)

    def _of_the_forward(self, choice: Choice | None, active: Active) -> Active:
        """Returns the selection of the forward that this backward pass recomputes."""
        if choice is not None and choice.task == _task():
            return active  # chosen within the recomputation, as it was within the forward
        region = _recomputed_region()
        record = getattr(region, _RECORD, {})
        if self.key in record:
            found: Active = record[self.key]
            return found
        if self.several:
            raise WeftError(
                "backward recomputes a forward of which it cannot be told which adapter was "
                "active. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or one "
                "adapter at a time."
            )
        return active


def recomputed() -> int | None:
    """Returns autograd's number of the node whose backward runs in this thread; None outside one."""
    node: Any = _node()
    return None if node is None else int(node._sequence_nr())


def describe(active: Active) -> str:
    """Returns the active adapter or rows, for messages."""
    if active is None:
        return "the base"
    return f"rows {list(active.names)}" if isinstance(active, PerRow) else repr(active)


def _region() -> Any:
    """The checkpointed region whose first forward runs now; None if there is none."""
    hooks = _hooks(True)
    for cell in getattr(hooks[0], "__closure__", None) or ():
        if isinstance(cell.cell_contents, checkpoint._CheckpointFrame):
            return cell.cell_contents
    return None


def _reentrant_region() -> Any:
    """The same for the reentrant kind: the node that torch makes for it."""
    return _from_the_stack(checkpoint.CheckpointFunction.forward.__code__, "ctx")


def _recomputed_region() -> Any:
    """The innermost checkpointed region that is being recomputed."""
    node = _node()
    if getattr(node, "_forward_cls", None) is checkpoint.CheckpointFunction:
        return node
    return _from_the_stack(None, "frame")


def _from_the_stack(code: Any, variable: str) -> Any:
    """A local variable of the innermost call of `code`, or of torch's function that recomputes."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        here = frame.f_code
        if here is code or (
            code is None
            and here.co_name == _UNPACK
            and here.co_filename == checkpoint.__file__
            and variable in here.co_freevars
        ):
            return frame.f_locals.get(variable)
        frame = frame.f_back
    return None
