"""Which adapter is active: one object a model, which every adapted layer reads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import WeftError
from ..ops import mixed
from .fastpath import FastPaths

if TYPE_CHECKING:
    from .adapter import Adapter
    from .merge import Merged

ATTRIBUTE = "_weft_model_state"
_MEMORY = 1024  # switches between a forward and its backward that a model remembers
_FORGOTTEN = "another adapter, too many switches ago"


def recomputed() -> int | None:
    """When the forward ran that this backward belongs to, in autograd's count of nodes; None where
    no backward runs.
    """
    node: Any = torch._C._current_autograd_node()
    # Autograd numbers its nodes as it makes them, so the node that asks tells when its forward ran.
    return None if node is None else int(node._sequence_nr())


class Rows:
    """One adapter name (or None for the base) per row of the batch, grouped: each adapter runs once
    on its rows.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        distinct = dict.fromkeys(n for n in names if n is not None)
        self.groups = {n: [i for i, m in enumerate(names) if m == n] for n in distinct}

    def index(self, name: str, rows: int, device: torch.device) -> Tensor:
        """The rows of the layer's first dimension that belong to `name`; each batch row may span
        several.
        """
        span = rows // len(self.names)
        first = torch.tensor(self.groups[name], device=device)[:, None] * span
        return (first + torch.arange(span, device=device)).reshape(-1)

    def check(self, x: Tensor, feature_dims: int) -> None:
        """The first dimension must be the batch, or batch x tokens flattened: anything else would
        mix up rows.
        """
        n, have = len(self.names), x.shape[0] if x.dim() > feature_dims else 0
        # Ids in one dimension are as likely positions as tokens, so those must be the batch itself.
        flat = feature_dims > 0 and x.dim() == feature_dims + 1 and have % n == 0
        if have != n and not flat:
            raise WeftError(
                f"weft.use was given {n} names, one per row, but a layer received an input of "
                "shape "
                f"{tuple(x.shape)}, whose first dimension is not these rows. Give one name per row "
                "of the "
                "batch; with k beams repeat each name k times."
            )


class Switch:
    """What every adapted layer of a model shares: which adapter, or which adapter a row, is
    active.
    """

    def __init__(self) -> None:
        self.active: str | Rows | None = None
        self.base_weights: dict[
            nn.Module, Tensor
        ] = {}  # layer -> its own weight, while another stands in its place
        # What became active when, in autograd's own count of the nodes it has made; each thread has
        # a count of its own.
        self._turns: deque[tuple[int, str | Rows | None]] = deque([(0, None)], _MEMORY)
        self._thread = threading.get_ident()

    def turn(self, active: str | Rows | None) -> None:
        """Make this the active adapter."""
        self._follow_thread()
        self.active = active
        self._turns.append((torch._C._autograd._get_sequence_nr(), active))

    def __getstate__(self) -> dict[str, Any]:
        # A copy has made no graph yet, and another process counts its nodes anew.
        return {**self.__dict__, "_turns": deque([(0, self.active)], _MEMORY)}

    def only(self, sites: Any) -> Any:
        """The site that answers for the whole batch; None where none does, or one a row."""
        self._guard_recompute()
        return sites[self.active] if isinstance(self.active, str) and self.active in sites else None

    def apply(self, sites: Any, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output under the active adapter(s), from its input x and base output y."""
        active = self.active
        if isinstance(active, Rows):
            return self._by_row(active, sites, x, y)
        if active is None or active not in sites:
            return y
        out: Tensor = sites[active](x, y)
        return out

    def guarded(self) -> str | Rows | None:
        """What is active, for a part of a forward that may be run again in backward."""
        self._guard_recompute()
        return self.active

    def _by_row(self, rows: Rows, sites: Any, x: Tensor, y: Tensor) -> Tensor:
        rows.check(x, feature_dims=x.dim() + 1 - y.dim())  # ids have no feature dimension
        if not y.shape[0]:
            return y
        here = [name for name in rows.groups if name in sites]
        together = [name for name in here if sites[name].joins(x)]
        out = y
        if together:
            parts = [
                mixed.Part(sites[name].factors(), tuple(rows.groups[name])) for name in together
            ]
            out = mixed.apply(x, y, sites[together[0]].host.bias, parts, len(rows.names)).view(
                y.shape
            )
            for name in together:
                sites[name].seen(out)
        for name in here:
            if name not in together:
                index = rows.index(name, y.shape[0], y.device)
                out = out.index_copy(0, index, sites[name](x[index], y[index]).to(out.dtype))
        return out

    def _guard_recompute(self) -> None:
        """Gradient checkpointing runs the forward again inside backward: it must be the same
        adapter's forward.
        """
        if torch.compiler.is_compiling():
            return
        made = recomputed()
        if made is None:
            self._follow_thread()
            return
        if not torch.is_grad_enabled():
            return
        then = next(
            (active for since, active in reversed(self._turns) if since <= made), _FORGOTTEN
        )
        if then is not self.active and then != self.active:
            raise WeftError(
                f"backward recomputes the forward under {describe(self.active)}, but the forward "
                f"ran under {describe(then)}. Call backward() inside the same `with weft.use(...)`."
            )

    def _follow_thread(self) -> None:
        if self._thread != threading.get_ident():
            self._thread = threading.get_ident()
            self._turns = deque([(0, self.active)], _MEMORY)


class State:
    """The adapters of one model. It hangs on the root; the layers know the switch only."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.switch = Switch()
        self.adapters: dict[str, Adapter] = {}
        self.merged: Merged | None = None
        self.required_grad: dict[
            str, bool
        ] = {}  # of the base's parameters, before the first attach
        self.row_check: RemovableHandle | None = None
        self.fast_paths = FastPaths()
        self.prompt_hooks: Any = None  # prompts.hooks.VirtualTokenHooks, if virtual tokens enter

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name; WeftError lists those that exist."""
        if name not in self.adapters:
            near = get_close_matches(str(name), self.adapters, n=2) or list(self.adapters)
            raise WeftError(
                f"no adapter is named {name!r} on this {type(self.root).__name__}. Nearest: {near}."
            )
        return self.adapters[name]


def describe(active: str | Rows | None) -> str:
    """For messages."""
    if active is None:
        return "the base"
    return f"rows {list(active.names)}" if isinstance(active, Rows) else repr(active)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model under DistributedDataParallel (`module`) and torch.compile (`_orig_mod`)."""
    parallel = isinstance(model, nn.parallel.DistributedDataParallel | nn.parallel.DataParallel)
    inner = model._modules.get("module" if parallel else "_orig_mod")
    if inner is None or ATTRIBUTE in model.__dict__ or len(model._modules) != 1:
        return model
    return unwrapped(inner)


def find_state(model: nn.Module) -> State | None:
    state = unwrapped(model).__dict__.get(ATTRIBUTE)
    return state if isinstance(state, State) else None


def state_of(model: nn.Module) -> State:
    state = find_state(model)
    if state is None:
        raise WeftError(
            f"{type(model).__name__} carries no adapter. Attach one with weft.attach(model, "
            "config), or "
            "pass the model that was given to weft.attach."
        )
    return state
