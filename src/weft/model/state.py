"""The adapters of one model, and the hooks through which its forwards pass. It hangs on the root."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import WeftError
from ..ops import input_cache
from . import cache_marks, row_calls
from .active import STATE, Active, ActiveAdapters, Choice, PerRow, caller, describe, names_of
from .adapter import Adapter
from .fastpath import FastPaths
from .gate import Gate, this_call
from .generator_block import Block
from .norm_watch import NormWatch
from .open_blocks import OpenBlocks
from .row_inputs import main_input
from .saving import check_merged, note_merged, unwatch_savers, watch_savers
from .selected import taken
from .uncalled import Uncalled
from .wiring import CURE, Wiring

ATTRIBUTE = STATE


@dataclass(frozen=True, eq=False)
class Backup:
    """One merged weight: its name, the parameter, its bits [...] before, its version and digest
    after.

    `packed`: the module whose packed layer was exchanged; then `bits` are its codes, and `dtype`
    that of the parameter that stands for them.
    """

    name: str
    parameter: nn.Parameter
    bits: Tensor
    version: int
    digest: tuple[int, int]
    packed: nn.Module | None = None
    dtype: torch.dtype | None = None


@dataclass
class Merged:
    """What is merged, and the bits that `unmerge` restores."""

    name: str
    backups: list[Backup] = field(default_factory=list)
    base_weights: dict[Any, Tensor] = field(default_factory=dict)


class State:
    """The adapters of one model. The layers only know its `active`."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.active = ActiveAdapters()
        self.active.root = weakref.ref(root)
        self.gate = self.active.gate = Gate()
        self.norms = NormWatch()
        self.wiring = Wiring()
        self.uncalled = Uncalled()
        self.adapters: dict[str, Adapter] = {}
        self.merged: Merged | None = None
        self.required_grad: dict[
            str, bool
        ] = {}  # of the base's parameters, before the first attach
        self.fast_paths = FastPaths()
        self.virtual: Any = None  # prompts.hooks.VirtualTokenHooks, if there are virtual tokens
        self.open = OpenBlocks()
        self._installed: str | None = None  # the adapter whose base tensors are in place
        self._hooks: list[RemovableHandle] = []
        self._guards: dict[nn.Module, RemovableHandle] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.wiring, self.uncalled = Wiring(), Uncalled()  # a pickle of an earlier version has none
        self.__dict__.update(state)
        self.active.root = weakref.ref(self.root)
        for name, adapter in self.adapters.items():
            self.active.follow(name, adapter.parameters())
        if self.merged is not None:  # a copy of a parameter counts its versions from 0
            backups = self.merged.backups
            self.merged.backups = [replace(b, version=b.parameter._version) for b in backups]

    def adapter(self, name: Any) -> Adapter:
        """Returns the adapter of that name. Raises WeftError that lists those that exist."""
        if not isinstance(name, str) or name not in self.adapters:
            near = get_close_matches(str(name), self.adapters, n=2) or list(self.adapters)
            raise WeftError(
                f"no adapter is named {name!r} on this {type(self.root).__name__}. Nearest: {near}."
            )
        return self.adapters[name]

    def watch_root(self) -> None:
        """Lets all forwards of the root pass through the gate."""
        self._hooks = [
            self.root.register_forward_pre_hook(_enter, with_kwargs=True),
            self.root.register_forward_hook(_leave, always_call=True),
            self.root.register_state_dict_post_hook(_say_merged),  # type: ignore[no-untyped-call]
            self.root.register_load_state_dict_pre_hook(_check_merged),  # type: ignore[no-untyped-call]
        ]
        watch_savers(self.root)
        encoder = row_calls.encoder_of(self.root)
        if encoder is not None:
            self._hooks.append(encoder.register_forward_hook(self._mark_encoded))

    def _mark_encoded(self, encoder: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            active = self.active.current(encoder.training)
            cache_marks.put(self.active, active, {"encoder_outputs": output})

    def unwatch_root(self) -> None:
        """Undoes `watch_root`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        unwatch_savers(self.root)

    def choose(
        self, active: Active, open_blocks: int | None = None, block: Block | None = None
    ) -> None:
        """Activates this for the caller, or the generator of the block, and installs its base
        tensors.
        """
        choice = self.active.chosen()
        blocks = open_blocks if open_blocks is not None else own_blocks(choice)
        self.active.choose(active, blocks, block)
        try:
            self.install_for(active)
        except WeftError:
            self.active.restore(choice)
            raise

    def set_default(self, active: Active) -> None:
        """Activates this for the caller and for every caller without a choice."""
        self.active.set_default(active)
        choice = self.active.chosen()
        if choice is not None:
            self.active.choose(active, own_blocks(choice))
        self.install_for(active)

    def forget(self, name: str) -> None:
        """Makes the base active for the caller and as default if this adapter was."""
        if self.active.default == name:
            self.active.set_default(None)
        choice = self.active.chosen()
        if choice is not None and name in names_of(choice.active):
            self.active.choose(None, own_blocks(choice))
        if self._installed == name:
            self.install(None)

    def install_for(self, active: Active) -> None:
        """Installs the base tensors of this selection as soon as no other thread is inside."""
        if not self.installed_for(active):
            with self.gate.alone("switch to another adapter's base tensors"):
                self.install(self._owner(active))

    def installed_for(self, active: Active) -> bool:
        """Returns True if the base tensors of this selection are installed."""
        return self._installed == self._owner(active)

    def install(self, name: str | None) -> None:
        """Installs the trained base tensors of this adapter, or the originals."""
        if self._installed == name:
            return
        before = self.adapters.get(self._installed or "")
        if before is not None:
            self._check_taken(before)
        for selected in before.selected_tensors.values() if before is not None else ():
            selected.install(selected.original)
            for layer in selected.layers():
                self.active.base_weights.pop(layer, None)
        after = self.adapters[name] if name is not None else None
        for selected in after.selected_tensors.values() if after is not None else ():
            selected.install(selected.trained)
            self.active.base_weights |= dict.fromkeys(selected.layers(), selected.original)
        self._installed = name

    def _check_taken(self, adapter: Adapter) -> None:
        """Raises WeftError if a trained copy would stay somewhere when it is switched off."""
        for full, (_, selected) in taken(self.root, adapter.selected_tensors.values()).items():
            own = next(n for n, s in adapter.selected_tensors.items() if s is selected)
            raise WeftError(
                f"{full!r} has shared one weight with {own!r} since adapter {adapter.name!r} was attached, "
                "which trains that as a copy (tie_weights?): it would keep the copy without the adapter. "
                f"{CURE}"
            )

    def begin_merge(self, record: Merged) -> None:
        """Switches all adapters off while the weights hold W'."""
        self.merged, self.active.base_weights = record, record.base_weights
        self.active.merged, self.active.merged_by = record.name, caller()

    def end_merge(self) -> None:
        """Forgets what was merged; the weights are not touched."""
        self.merged, self.active.base_weights = None, {}
        self.active.merged = self.active.merged_by = None

    def install_for_caller(self) -> None:
        """Puts the base tensors in place that go with what the caller has active."""
        self.install_for(self.active.selection())

    def guard(self, adapter: Adapter) -> None:
        """Lets every module that reads a base tensor of this adapter check which set is in place: a
        recomputation in backward, or a submodule on its own, does not pass the root's hooks.
        """
        for selected in adapter.selected_tensors.values():
            for module, _ in selected.holders:
                if module not in self._guards:
                    self._guards[module] = module.register_forward_pre_hook(self._check_holder)

    def unguard(self) -> None:
        """Takes the checks of `guard` off."""
        for hook in self._guards.values():
            hook.remove()
        self._guards.clear()

    def _check_holder(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        active = self.active.current(module.training)
        if not self.installed_for(active):
            raise WeftError(
                f"{describe(active)} needs its own base tensors here, and those of "
                f"{describe(self._installed)} are in place. Call the model itself and not a part of "
                "it, and backward() with gradient checkpointing inside the same `with weft.use(...)`."
            )

    def _owner(self, active: Active) -> str | None:
        """The adapter whose base tensors this selection needs; None for the originals."""
        adapter = self.adapters.get(active) if isinstance(active, str) else None
        if adapter is None or self.merged is not None or not adapter.selected_tensors:
            return None
        return adapter.name


def own_blocks(choice: Choice | None) -> int:
    """Returns how many adapters the caller's own open `with weft.use(...)` blocks use."""
    return choice.open if choice is not None and choice.owner == caller() else 0


@contextmanager
def base_only(state: State | None) -> Iterator[None]:
    """Installs the pretrained tensors, and afterwards the previous ones, while no other thread is
    inside.
    """
    if state is None:
        yield
        return
    with state.gate.alone("read the base"):
        before = state._installed
        state.install(None)
        try:
            yield
        finally:
            state.install(before)


def _enter(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Before a forward of the root: passes the gate and checks the caller's choice."""
    state = root.__dict__.get(ATTRIBUTE)
    if state is None or torch.compiler.is_compiling():
        return
    choice = state.active.chosen()
    if choice is not None and choice.block is not None:
        state.active.check_running(choice)
    active = state.active.default if choice is None else choice.active
    call = this_call()
    state.gate.enter(
        call, lambda: state.installed_for(active), lambda: state.install(state._owner(active))
    )
    input_cache.begin_forward(call)
    state.wiring.check(state)
    state.norms.check(state.adapters[n] for n in names_of(active) if n in state.adapters)
    # Inside the gate, where nobody can merge any more; if it raises, torch still calls `_leave`.
    _check_choice(state, active, chosen=choice is not None)
    if isinstance(active, PerRow):
        _check_rows(len(active.names), args, kwargs)
    if state.uncalled and state.merged is None and root is state.root:
        known = None if state.active.was_traced else active
        state.uncalled.enter(root, state.adapters, known, call)
    cache_marks.check(state.active, active, [*enumerate(args), *kwargs.items()])
    rows = active if isinstance(active, PerRow) else None
    row_calls.begin(call, root, state.active, rows, args, kwargs)


def _leave(root: nn.Module, args: Any, output: Any) -> None:
    state = root.__dict__.get(ATTRIBUTE)
    if state is not None and not torch.compiler.is_compiling():
        active = state.active.selection()
        cache_marks.put(state.active, active, output)
        call = this_call()
        input_cache.end_forward(call)
        row_calls.end(call)
        state.gate.leave(call)
        if state.uncalled and root is state.root:
            _look_for_uncalled(state, call, output)


def _look_for_uncalled(state: State, call: Any, output: Any) -> None:
    known = state.merged is None and not state.active.was_traced
    active = state.active.selection() if known else None
    ended = output is not None  # torch calls the hook after an error, too
    state.uncalled.leave(state.root, state.adapters, active, call, ended)


def _say_merged(root: nn.Module, found: dict[str, Any], prefix: str, metadata: Any) -> None:
    state = root.__dict__.get(ATTRIBUTE)
    if state is not None and state.merged is not None:
        note_merged(found, prefix, state.merged.name)


def _check_merged(root: nn.Module, found: dict[str, Any], prefix: str, *rest: Any) -> None:
    state = root.__dict__.get(ATTRIBUTE)
    here = None if state is None or state.merged is None else state.merged.name
    check_merged(found, prefix, here)


def _check_choice(state: State, active: Active, chosen: bool) -> None:
    if state.merged is not None:
        if chosen:
            state.active.current()  # raises if another adapter is merged
        return
    for name in names_of(active):
        state.active.check_attached(name)


def _check_rows(rows: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    main = main_input(args, kwargs)
    batch = rows if main is None else int(main.shape[0])
    if batch != rows:
        raise WeftError(
            f"weft.use was given {rows} names, one per row, but the batch has {batch} rows. Give "
            "one name per row; with k beams or samples per prompt, repeat each name k times."
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the user's model under DistributedDataParallel (`module`) and torch.compile
    (`_orig_mod`).
    """
    parallel = isinstance(model, nn.parallel.DistributedDataParallel | nn.parallel.DataParallel)
    inner = model._modules.get("module" if parallel else "_orig_mod")
    if inner is None or ATTRIBUTE in model.__dict__ or len(model._modules) != 1:
        return model
    return unwrapped(inner)


def find_state(model: nn.Module) -> State | None:
    """Returns the state of a model that carries adapters, or None."""
    state = unwrapped(model).__dict__.get(ATTRIBUTE)
    return state if isinstance(state, State) else None


def state_of(model: nn.Module) -> State:
    """Returns the state of a model. Raises WeftError if it carries no adapter."""
    state = find_state(model)
    if state is None:
        raise WeftError(
            f"{type(model).__name__} carries no adapter. Attach one with weft.attach(model, "
            "config), or pass the model that was given to weft.attach."
        )
    return state
