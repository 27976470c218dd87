"""Which adapter is active: one object a model, which every adapted layer reads."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import WeftError

if TYPE_CHECKING:
    from .adapter import Adapter
    from .merge import Merged

ATTRIBUTE = "_weft_model_state"


class Rows:
    """One adapter name (or None for the base) per row of the batch, grouped: each adapter runs once on its rows."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        distinct = dict.fromkeys(n for n in names if n is not None)
        self.groups = {n: [i for i, m in enumerate(names) if m == n] for n in distinct}

    def index(self, name: str, rows: int, device: torch.device) -> Tensor:
        """The rows of the layer's first dimension that belong to `name`; each batch row may span several."""
        span = rows // len(self.names)
        first = torch.tensor(self.groups[name], device=device)[:, None] * span
        return (first + torch.arange(span, device=device)).reshape(-1)

    def check(self, x: Tensor, feature_dims: int) -> None:
        """The first dimension must be the batch, or batch x tokens flattened: anything else would mix up rows."""
        n, have = len(self.names), x.shape[0] if x.dim() > feature_dims else 0
        flat = x.dim() == feature_dims + 1 and have % n == 0
        if have != n and not flat:
            raise WeftError(f"weft.use was given {n} names, one per row, but a layer received an input of shape "
                            f"{tuple(x.shape)}, whose first dimension is not these rows. Give one name per row of the "
                            "batch; with k beams repeat each name k times.")


class Switch:
    """What every adapted layer of a model shares: which adapter, or which adapter a row, is active."""

    def __init__(self) -> None:
        self.active: str | Rows | None = None
        self.seen: str | Rows | None = None  # what was active in the last forward that autograd recorded
        self.base_weights: dict[nn.Module, Tensor] = {}  # layer -> its own weight, while another is merged into it

    def apply(self, sites: Any, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output under the active adapter(s), from its input x and base output y."""
        self._guard_recompute()
        active = self.active
        if isinstance(active, Rows):
            return self._by_row(active, sites, x, y)
        if active is None or active not in sites:
            return y
        out: Tensor = sites[active](x, y)
        return out

    def _by_row(self, rows: Rows, sites: Any, x: Tensor, y: Tensor) -> Tensor:
        rows.check(x, feature_dims=x.dim() + 1 - y.dim())  # ids have no feature dimension
        out = y
        for name in rows.groups:
            if name in sites and y.shape[0]:
                index = rows.index(name, y.shape[0], y.device)
                out = out.index_copy(0, index, sites[name](x[index], y[index]).to(out.dtype))
        return out

    def _guard_recompute(self) -> None:
        """Gradient checkpointing runs the forward again inside backward: it must be the same adapter's forward."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if torch._C._current_graph_task_id() == -1:  # type: ignore[attr-defined]
            self.seen = self.active
        elif self.seen is not self.active and self.seen != self.active:
            raise WeftError(f"backward recomputes the forward under {describe(self.active)}, but the forward "
                            f"ran under {describe(self.seen)}. Call backward() inside the same `with weft.use(...)`.")


class State:
    """The adapters of one model. It hangs on the root; the layers know the switch only."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.switch = Switch()
        self.adapters: dict[str, Adapter] = {}
        self.merged: Merged | None = None
        self.required_grad: dict[str, bool] = {}  # of the base's parameters, before the first attach
        self.row_check: RemovableHandle | None = None

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name; WeftError lists those that exist."""
        if name not in self.adapters:
            near = get_close_matches(str(name), self.adapters, n=2) or list(self.adapters)
            raise WeftError(f"no adapter is named {name!r} on this {type(self.root).__name__}. Nearest: {near}.")
        return self.adapters[name]


def describe(active: str | Rows | None) -> str:
    return "the base" if active is None else repr(active) if isinstance(active, str) else f"rows {list(active.names)}"


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model under DistributedDataParallel (`module`) and torch.compile (`_orig_mod`)."""
    for inner in ("_orig_mod", "module"):
        child = model._modules.get(inner)
        if child is not None and ATTRIBUTE not in model.__dict__ and len(model._modules) == 1:
            return unwrapped(child)
    return model


def find_state(model: nn.Module) -> State | None:
    state = unwrapped(model).__dict__.get(ATTRIBUTE)
    return state if isinstance(state, State) else None


def state_of(model: nn.Module) -> State:
    state = find_state(model)
    if state is None:
        raise WeftError(f"{type(model).__name__} carries no adapter. Attach one with weft.attach(model, config), or "
                        "pass the model that was given to weft.attach.")
    return state
