"""Which adapter is active, for each caller: one object per model, which every adapted layer reads.

The choice of `weft.use` belongs to the calling thread or asyncio task (a context variable). A
caller that has chosen nothing gets the model's default, the adapter that was attached last.

Gradient checkpointing runs a forward again inside backward, in whatever thread and under whatever
choice backward runs. So the choice of the forward is written on torch's own record of the
checkpointed region (its frame, or the node of the reentrant kind), where the recomputation finds
it.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MergeError, UnsupportedError, WeftError
from . import regions
from .gate import Gate
from .generator_block import Block, Blocks
from .versions import Versions

_keys = itertools.count()
STATE = "_weft_model_state"  # where a model keeps its adapters (state.py)
ROWS_FOUND = "_weft_rows"  # on an adapted module: where its rows have been found, in any call
NO_TASK = 0  # in place of a task, outside asyncio
_node = torch._C._current_autograd_node
_task = torch._C._current_graph_task_id
_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_TRACED = (
    "weft.use in a generator of a compiled model: torch.compile follows the thread's choice, which a "
    "generator leaves to its consumer. Use the model uncompiled, or leave the block before the yield."
)


class PerRow:
    """One adapter name (or None for the base) per row of the batch, grouped by adapter. `differ`:
    whether there is more than one name.
    """

    def __init__(self, names: Sequence[str | None], root: nn.Module | None = None) -> None:
        self.names = tuple(names)
        self.differ = len(set(names)) > 1
        self.root = None if root is None else weakref.ref(root)  # of the model
        distinct = dict.fromkeys(n for n in names if n is not None)
        self.groups = {n: [i for i, m in enumerate(names) if m == n] for n in distinct}

    def index(self, name: str, rows: int, device: torch.device) -> Tensor:
        """Returns [n] indices: the rows of a layer's first dimension that belong to adapter `name`.

        Flattened tokens give several such rows per row of the batch.
        """
        span = rows // len(self.names)
        first = torch.tensor(self.groups[name], device=device)[:, None] * span
        return (first + torch.arange(span, device=device)).reshape(-1)

    def __reduce__(self) -> Any:
        return PerRow, (self.names,)


class Weighted:
    """Several adapters at once, each with a strength: y + Σ w (adapter(x) - y) in every layer."""

    def __init__(self, strengths: Mapping[str, float]) -> None:
        self.strengths = {name: float(w) for name, w in strengths.items()}


Active = str | PerRow | Weighted | None


def names_of(active: Active) -> tuple[str, ...]:
    """Returns the adapters of a selection, each once."""
    if isinstance(active, PerRow):
        return tuple(active.groups)
    if isinstance(active, Weighted):
        return tuple(active.strengths)
    return () if active is None else (active,)


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """What one caller chose, the checkpointed region and the backward pass in which it did, and how
    many adapters its open `with weft.use(...)` blocks use. `owner`: the thread and task that chose;
    a task that was started inside a block inherits the choice, and not the block. `block`: that of
    the generator that chose.
    """

    active: Active
    region: Any
    task: int
    open: int
    owner: tuple[int, int]
    block: Block | None = None


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
        self.gate = Gate()  # the model's
        self.names: dict[str, int] = {}  # the attached adapters, each with a number of its own
        self.versions: dict[str, Versions] = {}  # of their tensors
        self.marked: set[str] = set()  # adapters whose virtual tokens mark a cache by themselves
        self.merged: str | None = None  # the adapter that is in the weights; then all are off
        self.merged_by: tuple[int, int] | None = None  # the caller who merged it
        self.base_weights: dict[Any, Tensor] = {}  # layer's key -> its own weight while replaced
        self.was_traced = False  # whether torch.compile has traced a forward
        self.several = False  # whether more than one has ever been active
        self.traced = _Traced()
        self.blocks = Blocks()  # of generators that are inside `with weft.use(...)`
        self.probes: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        self._asked: set[weakref.ref[Any]] = set()  # the rows and sums that callers have chosen
        self.root: weakref.ref[nn.Module] | None = None
        self._modules: set[nn.Module] | None = None  # the root's, once asked for

    def __getstate__(self) -> dict[str, Any]:
        return {
            "default": self.selection(),
            "gate": self.gate,
            "names": dict(self.names),
            "changes": {name: found.count() for name, found in self.versions.items()},
            "marked": set(self.marked),
            "merged": self.merged,
            "base_weights": self.base_weights,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["default"])  # type: ignore[misc]
        self.gate, self.names, self.merged = state["gate"], state["names"], state["merged"]
        self.base_weights, self.marked = state["base_weights"], state["marked"]
        self.versions = {name: Versions((), n) for name, n in state.get("changes", {}).items()}
        self._note_asked(self.default)

    def follow(self, name: str, tensors: Iterable[Tensor], changed: bool = False) -> None:
        """Notices from now on when these tensors of an adapter change. `changed`: they are other
        tensors than before.
        """
        before = self.versions.get(name)
        changes = 0 if before is None else before.changes
        self.versions[name] = Versions(tensors, changes + changed)

    def stamp(self, name: str) -> tuple[int, int]:
        """Returns two numbers that an adapter has as long as it stays attached and unchanged."""
        versions = self.versions.get(name)
        return self.names.get(name, -1), 0 if versions is None else versions.count()

    def modules(self) -> set[nn.Module] | None:
        """Returns the modules of the model, as it was at the last attach or later; None if unknown."""
        root = None if self.root is None else self.root()
        if self._modules is None and root is not None:
            self._modules = set(root.modules())
        return self._modules

    def in_use(self, kind: type[PerRow | Weighted], name: str) -> bool:
        """Whether some caller has chosen rows, or a sum, with this adapter, and not yet left them."""
        found = (ref() for ref in [*self._asked])
        return any(isinstance(one, kind) and name in names_of(one) for one in found)

    def _note_asked(self, active: Active) -> None:
        if isinstance(active, PerRow | Weighted):
            self._asked.add(weakref.ref(active, self._asked.discard))

    def forget_calls(self) -> None:
        """Forgets what calls of the model have shown; another adapter is on it now."""
        self.probes.clear()
        self._modules = None

    def current(self, checkpointed: bool = False) -> Active:
        """Returns what is active for this caller, or was in the forward that is being recomputed.

        `checkpointed`: without gradients, this may be the first forward of a reentrant checkpoint.
        Raises MergeError if an adapter is merged and the caller has chosen another, and WeftError
        if it cannot be known which adapter the recomputed forward used.
        """
        if torch.compiler.is_compiling():
            traced = self.traced.choice
            self.was_traced = True
            if self.merged is not None:
                return None
            if traced is not None and traced.block is not None:
                raise UnsupportedError(_TRACED)
            return self.default if traced is None else traced.active
        choice = self.chosen()
        if choice is not None and choice.block is not None:
            self.check_running(choice)
        active = self.default if choice is None else choice.active
        if self.merged is not None:
            self._check_merged(choice, active)
            return None
        if _node() is not None:
            return self._of_the_forward(choice, active)
        if torch.is_grad_enabled():
            if _hooks(True) is not None:
                self._record(choice, active)
        elif checkpointed:
            self._record(choice, active)
        return active

    def _check_merged(self, choice: Choice | None, active: Active) -> None:
        if choice is not None and active != self.merged and choice.owner != self.merged_by:
            raise MergeError(
                f"adapter {self.merged!r} is merged into the weights, and this caller has chosen "
                f"{describe(active)}. Call weft.unmerge(model) first."
            )

    def check_attached(self, name: str) -> None:
        """Raises WeftError if the adapter that the caller has chosen is no longer attached."""
        if name not in self.names:
            raise WeftError(
                f"adapter {name!r}, which this caller has chosen, was detached. Have: "
                f"{sorted(self.names)}; choose again with weft.use."
            )

    def chosen(self) -> Choice | None:
        """Returns the choice of this caller, or None."""
        choice = _choices.get().get(self.key)
        if self.blocks:
            here = self.blocks.innermost()
            if here is not None:
                found: Choice | None = here.choice
                return choice if choice is not None and choice.block is here else found
        while choice is not None and choice.block is not None and choice.block.is_closed:
            if choice.owner != caller():
                break
            choice = choice.block.before
        return choice

    def selection(self) -> Active:
        """Returns what the caller has chosen, or the default: whatever is merged or recomputed."""
        choice = self.chosen()
        return self.default if choice is None else choice.active

    def check_running(self, choice: Choice) -> None:
        """Raises WeftError if a generator has left this choice behind at a `yield`."""
        block = choice.block
        if block is None or self.blocks.innermost() is block:
            return
        if choice.owner != caller() and block.runs():
            return  # it waits for this thread or task, which it has started
        raise WeftError(
            f"{describe(choice.active)} was chosen by the generator {block.where}, which yields "
            "inside `with weft.use(...)`. Choose here what you want to run, with weft.use, or leave "
            "the block before the yield."
        )

    def choose(self, active: Active, open_blocks: int, block: Block | None = None) -> None:
        """Makes this active for the caller; `block`: of the generator that it is, if it enters one."""
        self.several = self.several or active != self.default
        self._note_asked(active)
        region = next(regions.around(), None)
        own = block or self.blocks.innermost()
        choice = Choice(active, region, _task(), open_blocks, caller(), own)
        if block is not None and not block.depth:  # until it goes on, its consumer is told
            block.choice = choice
            self._store(choice)
        else:
            self.restore(choice)

    def restore(self, choice: Choice | None) -> None:
        """Restores the choice that `chosen` returned."""
        block = self.blocks.innermost() if self.blocks else None
        if block is not None:
            block.choice = choice
            stored = self.stored()
            if stored is None or stored.block is not block:
                return  # its consumer has chosen since
        self._store(choice)

    @contextlib.contextmanager
    def instead(self, active: Active) -> Iterator[None]:
        """Makes this active for what the block runs, and leaves no trace of it."""
        stored, traced, block = self.stored(), self.traced.choice, self.blocks.innermost()
        now, chosen = self.chosen(), None if block is None else block.choice
        region, task = (None, -1) if now is None else (now.region, now.task)
        choice = Choice(active, region, task, 0, caller(), block)
        if block is not None:
            block.choice = choice
        self._store(choice)
        try:
            yield
        finally:
            self._store(stored)
            self.traced.choice = traced
            if block is not None:
                block.choice = chosen

    def stored(self) -> Choice | None:
        """Returns the choice that this thread or task carries, its own or a generator's."""
        return _choices.get().get(self.key)

    def _store(self, choice: Choice | None) -> None:
        others = {k: v for k, v in _choices.get().items() if k != self.key}
        _choices.set(others if choice is None else {**others, self.key: choice})
        self.traced.choice = choice

    def set_default(self, active: Active) -> None:
        """Makes this active for every caller without a choice of its own."""
        self.several = self.several or (self.default is not None and active != self.default)
        self.default = active
        self._note_asked(active)

    def _record(self, choice: Choice | None, active: Active) -> None:
        """Notes on the checkpointed regions around this call what is active, from the innermost
        outwards to that in which it was chosen: that one will choose again by itself.
        """
        innermost = regions.innermost() if torch.is_grad_enabled() else None
        if innermost is not None and self.key in getattr(innermost, regions.RECORD, ()):
            return
        around = list(regions.around())
        if innermost is not None and all(innermost is not region for region in around):
            around.insert(0, innermost)
        for region in around:
            if choice is not None and choice.region is region:
                return
            regions.note(region, self.key, active)

    def _of_the_forward(self, choice: Choice | None, active: Active) -> Active:
        """What was active in the forward that this backward pass recomputes."""
        if choice is not None and choice.task == _task():
            return active  # chosen within the recomputation, as it was within the forward
        new: list[Any] = []  # regions that begin within the recomputation
        for region in regions.around():
            record = getattr(region, regions.RECORD, {})
            if self.key in record:
                found: Active = record[self.key]
                for inner in new:
                    regions.note(inner, self.key, found)
                return found
            new.append(region)
        if self.several:
            raise WeftError(
                "backward recomputes a forward of which it cannot be known which adapter was "
                "active. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or train() "
                "mode, or one adapter."
            )
        return active


def recomputed() -> int | None:
    """Returns autograd's number of the node whose backward runs in this thread; None outside one."""
    node: Any = _node()
    return None if node is None else int(node._sequence_nr())


def describe(active: Active) -> str:
    """Returns the active adapter, rows or sum, for messages."""
    if active is None:
        return "the base"
    if isinstance(active, Weighted):
        return f"the sum {active.strengths}"
    return f"rows {list(active.names)}" if isinstance(active, PerRow) else repr(active)


def caller() -> tuple[int, int]:
    """Returns the thread and the asyncio task that run now."""
    asyncio = sys.modules.get("asyncio")
    task = None
    if asyncio is not None:
        with contextlib.suppress(RuntimeError):  # no loop runs in this thread
            task = asyncio.current_task()
    return threading.get_ident(), NO_TASK if task is None else id(task)
