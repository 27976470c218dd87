"""Fused experts of transformers: a module with one three-dimensional weight per projection, which a
router sends tokens through. Each of these weights is a layer of its own, named after its parameter.

Two forwards are known; a class with any other is refused by name. `ROUTED` is that of
transformers' experts interface, which most classes have:

    x = hidden[tokens], sorted by expert      y = down_e(gate(first_e x)) · w,      summed per token

and `SORTED` is Llama 4's, in which every expert gets all tokens, already sorted and weighted.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...ops import grouped
from .base import INNER_FORWARD, BaseLayer, dtype_fault, own_class, own_forward

# Computes x W_eᵀ + bias_e [rows, out] of the weight with this name, for rows that are sorted by expert.
Linear = Callable[[str, grouped.Rows, grouped.Groups], Tensor]
_EXACT = (
    None,
    "eager",
    "batched_mm",
    "grouped_mm",
)  # implementations that are products of torch's own
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2}
_faults: dict[tuple[Any, ...], str | None] = {}  # what was tried, per kind of module
# The kind; and that of a module whose in and out peft takes for each other (formats/peft_experts.py).
KIND, EXCHANGED = "experts", "experts-turned"
_HOOK, _OLD_FORWARD = "_hf_hook", "_old_forward"  # where accelerate keeps them (offload.py)
_SHARDED = "its weight is sharded or of a class of its own"


class ExpertsLayer(BaseLayer):
    """One fused weight of a module, `tensor`: W [E, out, in], with one bias [E, out] or none."""

    kind = KIND

    def __init__(self, module: nn.Module, tensor: str) -> None:
        super().__init__(module)
        self.tensor = tensor
        if self.turned and not getattr(module, "is_transposed", False):
            self.kind = EXCHANGED  # type: ignore[misc]

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return bool(cls.tensors_of(module))

    @classmethod
    def tensors_of(cls, module: Any) -> tuple[str, ...]:
        form = _form_of(module)
        return () if form is None else form.tensors(module)

    @classmethod
    def why_not(cls, module: nn.Module, tensor: str = "") -> str | None:
        return _fault(module) or next(
            (why for each in cls.tensors_of(module) if (why := _weight_fault(module, each))), None
        )

    @property
    def stack(self) -> int:
        return int(self.parameter.shape[0])

    @property
    def turned(self) -> bool:
        form = _form_of(self.module)
        return form is not None and form.turned(self.module)

    def weight(self) -> Tensor:
        """Returns W [E, out, in], a view."""
        return self.matrix(self.parameter)

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.transpose(1, 2) if self.turned else stored

    def stored(self, W: Tensor) -> Tensor:
        return W.transpose(1, 2) if self.turned else W

    @property
    def out_features(self) -> int:
        return self.weight().shape[1]

    @property
    def bias(self) -> Tensor | None:
        """[E, out] or None."""
        found: Tensor | None = self.module._parameters.get(f"{self.tensor}_bias")
        return found

    def of_weight(self, i: int) -> BaseLayer:
        """Returns the view of expert i's weight [out, in]."""
        return _One(self, i)

    def forward(self, x: Tensor) -> Tensor:
        """Raises NotImplementedError: it takes a router's choice, not an input alone."""
        raise NotImplementedError("fused experts have no forward of an input alone")


class _One(BaseLayer):
    """One expert's weight [out, in], as methods read it for their tensors at the start."""

    def __init__(self, layer: ExpertsLayer, i: int) -> None:
        super().__init__(layer.module)
        self._layer, self._i = layer, i

    def weight(self) -> Tensor:
        return self._layer.weight()[self._i]

    @property
    def bias(self) -> Tensor | None:
        bias = self._layer.bias
        return None if bias is None else bias[self._i]


class Call:
    """The arguments of one forward of a module, in the form that the module has.

    `hidden`: the input whose rows a batch's rows are, [..., width].
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        form = _form_of(module)
        assert form is not None
        values = args
        if kwargs:
            signature = inspect.signature(own_class(module).forward)
            values = tuple(signature.bind(module, *args, **kwargs).arguments.values())[1:]
        self._module, self._form = module, form
        self.given = form.given(module, *values)
        self.hidden: Tensor = self.given[0]

    def compute(self, linear: Linear, rows: Callable[[Tensor], None] | None = None) -> Tensor:
        """Returns the module's output, with `linear` in the place of its products. `rows` is called
        with the position in `hidden` of every row that `linear` is going to get.
        """
        found: Tensor = self._form.compute(self._module, linear, rows, *self.given)
        return found


class _Routed:
    """transformers.integrations.moe.use_experts_implementation."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        code = _interface()
        return code is not None and getattr(own_class(module).forward, "__code__", None) is code

    @staticmethod
    def tensors(module: Any) -> tuple[str, ...]:
        return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")

    @staticmethod
    def turned(module: Any) -> bool:
        return bool(module.is_transposed)

    @staticmethod
    def fault(module: Any) -> str | None:
        if module._is_expert_parallel:
            return "its experts are spread over processes (expert parallelism)"
        return implementation_fault(module)

    @staticmethod
    def given(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return hidden, index, weights

    @classmethod
    def compute(
        cls,
        module: Any,
        linear: Linear,
        rows: Callable[[Tensor], None] | None,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
    ) -> Tensor:
        (tokens, k), (first, down) = index.shape, cls.tensors(module)
        groups, places = grouped.sorted_by_expert(index, module.num_experts)
        token = places // k
        if rows is not None:
            rows(token)
        x = hidden.to(getattr(module, first).dtype)
        y = linear(first, grouped.Rows(x, token), groups)
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = linear(down, grouped.Rows(y), groups)
        if module.has_post_expert_norm:
            y = module.post_expert_norm(y)
        y = y * weights.reshape(-1)[places].unsqueeze(-1)
        found = y.new_zeros(tokens * k, y.shape[1]).index_put((places,), y)
        return found.view(tokens, k, -1).sum(1).to(hidden.dtype)

    @staticmethod
    def example(module: Any, W: Tensor) -> tuple[Tensor, ...]:
        experts = module.num_experts
        index = torch.tensor([[0, experts - 1], [experts // 2, 0]], device=W.device)
        weights = torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=W.dtype, device=W.device)
        return _spread(2, W), index, weights


class _Sorted:
    """transformers' Llama4TextExperts."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        library = sys.modules.get("transformers.models.llama4.modeling_llama4")
        cls = getattr(library, "Llama4TextExperts", None)
        return cls is not None and own_class(module).forward is cls.forward

    @staticmethod
    def tensors(module: Any) -> tuple[str, ...]:
        return "gate_up_proj", "down_proj"

    @staticmethod
    def turned(module: Any) -> bool:
        return True

    @staticmethod
    def fault(module: Any) -> str | None:
        return None

    @staticmethod
    def given(module: Any, hidden: Tensor) -> tuple[Tensor, ...]:
        return (hidden.view(module.num_experts, -1, module.hidden_size),)

    @staticmethod
    def compute(
        module: Any, linear: Linear, rows: Callable[[Tensor], None] | None, hidden: Tensor
    ) -> Tensor:
        experts, tokens, width = hidden.shape
        ids = torch.arange(experts, device=hidden.device).repeat_interleave(tokens)
        groups = grouped.Groups(ids, experts)
        if rows is not None:
            rows(torch.arange(len(ids), device=hidden.device))
        y = linear("gate_up_proj", grouped.Rows(hidden.reshape(-1, width)), groups)
        gate, up = y.chunk(2, dim=-1)
        return linear("down_proj", grouped.Rows(up * module.act_fn(gate)), groups)

    @staticmethod
    def example(module: Any, W: Tensor) -> tuple[Tensor, ...]:
        return (_spread(2 * W.shape[0], W),)


_FORMS: tuple[Any, ...] = (_Routed, _Sorted)


def implementation_fault(module: Any) -> str | None:
    """Returns why the experts implementation that a module is to use now is not followed, or None."""
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if chosen in _EXACT:
        return None
    return (
        f"its experts implementation {chosen!r} is a kernel that an adapter cannot reach into; "
        "choose another with model.set_experts_implementation('grouped_mm')"
    )


def plain_linear(module: nn.Module) -> Linear:
    """Returns the products of a module without adapters."""

    def linear(tensor: str, rows: grouped.Rows, groups: grouped.Groups) -> Tensor:
        layer = ExpertsLayer(module, tensor)
        return grouped.product(rows, layer.weight(), groups, layer.bias)

    return linear


def _form_of(module: nn.Module) -> Any:
    return next((form for form in _FORMS if form.matches(module)), None)


@functools.lru_cache(maxsize=8)
def _code_of(interface: Any) -> Any:
    class Example(nn.Module):
        def forward(self) -> None: ...

    return interface(Example).forward.__code__


def _interface() -> Any:
    """The code of every forward that transformers' decorator makes; None if nobody has imported it."""
    interface = getattr(
        sys.modules.get("transformers.integrations.moe"), "use_experts_implementation", None
    )
    return None if interface is None else _code_of(interface)


def _weight_fault(module: nn.Module, tensor: str) -> str | None:
    weight = module._parameters.get(tensor)
    if weight is None:
        return f"it has no parameter {tensor!r} of its own"
    for name in (tensor, f"{tensor}_bias"):
        t = module._parameters.get(name)
        if t is not None and type(t) is not nn.Parameter:
            return _SHARDED
        if t is not None and (fault := dtype_fault(t)) is not None:
            return f"{name!r} is quantised ({fault})"
    if weight.ndim != 3:
        return f"{tensor!r} has {weight.ndim} dimensions"
    return None


def _fault(module: nn.Module) -> str | None:
    form: Any = _form_of(module)
    if form is None:
        return f"Weft does not know the forward of {own_class(module).__name__}"
    if parametrize.is_parametrized(module):
        return "its weights are parametrised (an adapter of peft may be on them)"
    if _foreign(module):
        return "another library has put its own forward on it (offloading, or a kernel)"
    fault: str | None = form.fault(module)
    if fault is not None:
        return fault
    weights = [module._parameters.get(tensor) for tensor in form.tensors(module)]
    if any(w is None or w.is_meta or w.ndim != 3 for w in weights):
        return None  # of the weights, or there is nothing to try
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    first: Any = weights[0]
    key = own_class(module), chosen, first.dtype, first.device.type
    if key not in _faults:
        _faults[key] = _other_map(module, form)
    return _faults[key]


def _foreign(module: nn.Module) -> bool:
    """Whether a forward on the module is no mere hook of accelerate that moves its input."""
    own = module.__dict__
    hook: Any = own.get(_HOOK)
    moves = hook is not None and _OLD_FORWARD in own
    parts = getattr(hook, "hooks", (hook,))
    if moves and not any(getattr(part, "offload", False) is True for part in parts):
        return False
    return "forward" in own or INNER_FORWARD in own


@torch.no_grad()
def _other_map(module: Any, form: Any) -> str | None:
    """Returns why a module computes something else than the forward that Weft knows, or None. Two
    tokens are tried.
    """
    name, tensors = own_class(module).__name__, form.tensors(module)
    W = module._parameters[tensors[0]].detach()
    given = form.example(module, W.transpose(1, 2) if form.turned(module) else W)
    try:
        found: Any = own_forward(module, *given)
    except Exception as error:
        return (
            f"the forward of {name} fails by itself ({error}); another implementation may run: "
            "model.set_experts_implementation('eager')"
        )
    wanted = Call(module, given, {}).compute(plain_linear(module))
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return f"the forward of {name} returns something else than one output per token"
    gap, size = (found - wanted).abs().max(), wanted.abs().max()
    if not bool(gap <= _ROUNDING.get(W.dtype, 5e-2) * size) and bool(size.isfinite()):
        return f"the forward of {name} computes something else than its experts' products"
    return None


def _spread(rows: int, W: Tensor) -> Tensor:
    """Rows [rows, in] of numbers between -1 and 1 for W [E, out, in]."""
    numbers = torch.linspace(-1, 1, rows * W.shape[2] + 1, dtype=W.dtype, device=W.device)[1:]
    return numbers.sin().view(rows, -1)
