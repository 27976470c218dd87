"""An adapted layer: the user's own module, its class swapped for a subclass whose forward adds the
active adapters.

The layer stays where it is, stays an instance of its class and keeps its parameters; `restore`
gives the class back.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..methods.base import DTYPES, Draw, Factored, Fixed, Shared, Stateful
from ..ops import factors
from ..ops.derived import Derived
from ..ops.factors import Factors
from . import paths
from .hosts import INNER_FORWARD, own_forward
from .state import Switch

if TYPE_CHECKING:
    from .stepping import Watch

CHILD = "weft"
_SWITCH = "_weft_switch"
_HOOKS = "_weft_hooks"
_classes: dict[
    type[nn.Module], type[nn.Module]
] = {}  # the layer's own class -> the one that runs its adapters too


class Site(nn.Module):
    """One adapter's tensors on one layer; what a rule reads as `p`. `shape` is the weight's (out,
    in).
    """

    def __init__(self, rule: Any, host: Any, shared: Shared | None) -> None:
        super().__init__()
        self.rule, self.host, self.shared = rule, host, shared
        self.shape = (host.out_features, host.in_features)
        self.names = tuple(rule.trained(*self.shape))
        self.derived = Derived()
        self.written = False  # something in the model may write to this layer's output
        self.watch: Watch | None = (
            None  # of the first layer of an adapter whose rule follows the optimiser's steps
        )

    def start(self, draw: Draw) -> None:
        """Create the trained tensors at their starting values, on the device of the layer's weight,
        and what the rule keeps beside them: frozen tensors that are never saved, and state that the
        model's state_dict holds.
        """
        self.draw, device = draw, self.host.device
        with torch.no_grad():
            for name, value in self.rule.start(self.host, draw, self.shared).items():
                self.register_parameter(name, nn.Parameter(value.to(DTYPES[self.rule.dtype])))
            fixed = self.fixed(device)
            for name, value in fixed.items():
                self.register_buffer(name, value.to(DTYPES[self.rule.dtype]), persistent=False)
            state = self.rule.state(self.shape, device) if isinstance(self.rule, Stateful) else {}
            for name, value in state.items():
                self.register_buffer(name, value)
        self.fixed_names, self.state_names = tuple(fixed), tuple(state)

    def fixed(self, device: torch.device) -> dict[str, Tensor]:
        """The rule's frozen tensors for this layer, drawn anew in float32."""
        if not isinstance(self.rule, Fixed):
            return {}
        return self.rule.fixed(self.host.kind, self.shape, self.draw, device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """A cast to bfloat16 and back would lose bits of the frozen tensors for ever, so they are
        drawn again.
        """
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = next(
            (b for name, b in self._buffers.items() if b is not None and b is not before[name]),
            None,
        )
        for name, value in self.fixed(moved.device).items() if moved is not None else ():
            self._buffers[name] = value.to(self.get_buffer(name).dtype)
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained tensors by name, in the order of the rule."""
        return {name: self.get_parameter(name) for name in self.names}

    @property
    def rank(self) -> int | None:
        """The rank in force: the rule's, or what it has reached."""
        reached = getattr(self.rule, "rank", None)
        found: int | None = getattr(self.rule, "r", None) if reached is None else reached(self)
        return found

    def take(self, rule: Any) -> None:
        """Become the layer of a rule of smaller rank, whose tensors are the first part of these in
        every dimension.
        """
        with torch.no_grad():
            for name, shape in rule.trained(*self.shape).items():
                old = self.get_parameter(name)
                first = old.detach()[tuple(slice(n) for n in shape)].clone()
                self.register_parameter(name, nn.Parameter(first, requires_grad=old.requires_grad))
            for name, value in (
                rule.state(self.shape, old.device) if self.state_names else {}
            ).items():
                value = value if name != "step" else self.get_buffer(name)
                self.register_buffer(name, value)
        self.rule = rule

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output with this adapter, from its input and its own output."""
        return self.seen(self.rule.forward(x, y, self.host, self))

    def seen(self, out: Tensor) -> Tensor:
        """The output, once the watch over the optimiser's steps, if there is one, has looked at
        it.
        """
        if self.watch is not None and self.training and not torch.compiler.is_compiling():
            self.watch.look(self, out)
        return out

    def why_plain(self, x: Tensor) -> str | None:
        """The reason why `fused` may not be called for this input; None where it may."""
        if not isinstance(self.rule, Factored):
            return f"{type(self.rule).__name__} is no product of two thin matrices"
        return self.host.why_plain or paths.why_plain(x, self.host.weight(), self.host.bias)

    def fused(self, x: Tensor) -> Tensor:
        """The same from the input alone, in one function that keeps less and runs faster."""
        return self.seen(factors.fused(x, self.host.weight(), self.host.bias, self.factors(x)))

    def factors(self, x: Tensor | None = None) -> Factors:
        """The layer's tensors in the form that all methods of the family have in common, for an
        input to come.
        """
        rule: Any = self.rule
        found: Factors = rule.factors(self.host, self, x)
        return found

    def joins(self, x: Tensor) -> bool:
        """The site can be computed together with others, each on rows of its own."""
        return self.why_plain(x) is None and not (
            self.training and getattr(self.rule, "dropout", None)
        )


def adapted_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The base layer's own forward, then the active adapters."""
    switch: Switch | None = self.__dict__.get(_SWITCH)
    if switch is None:  # accelerate's hooks keep the forward that they found, even beyond detach
        return own_forward(self, *args, **kwargs)
    sites, x = self._modules[CHILD], args[0] if args else next(iter(kwargs.values()))
    site = switch.only(sites)
    if site is not None:
        reason = site.why_plain(x)
        if reason is None:
            found: Tensor = site.fused(x)
            return found
        if not torch.compiler.is_compiling():
            paths.note(reason)
    return switch.apply(sites, x, own_forward(self, *args, **kwargs))


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = _adapted_class(base)
    return cls.__new__(cls)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    # The subclass is made at run time, so a copy or a pickle names the base class and makes it
    # anew.
    return _blank, (type(self)._weft_base,), self.__dict__  # type: ignore[attr-defined]


def _adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _classes:
        body = {
            "_weft_base": base,
            "forward": adapted_forward,
            "__reduce_ex__": _reduce,
            "__module__": base.__module__,
            "__doc__": base.__doc__,
        }
        _classes[base] = types.new_class(
            f"Adapted{base.__name__}", (base,), exec_body=lambda names: names.update(body)
        )
    return _classes[base]


def is_adapted(module: nn.Module) -> bool:
    return _SWITCH in module.__dict__


def adapt(module: nn.Module, switch: Switch) -> None:
    """Swap the class and add the container of sites; nothing else of the layer changes."""
    module.__dict__[_SWITCH] = switch
    if (
        "forward" in module.__dict__
    ):  # accelerate's device hooks put a forward on the instance; keep it inside ours
        module.__dict__[INNER_FORWARD] = module.__dict__.pop("forward")
    module.__class__ = _adapted_class(type(module))
    module.add_module(CHILD, nn.ModuleDict())


def adopt(module: nn.Module, switch: Switch, before: Any = None) -> None:
    """Add the container of sites to a module that keeps its class and its forward; `before` hooks
    its input.
    """
    module.__dict__[_SWITCH] = switch
    module.__dict__[_HOOKS] = (
        [module.register_forward_pre_hook(before, with_kwargs=True)] if before is not None else []
    )
    module.add_module(CHILD, nn.ModuleDict())


def restore(module: nn.Module) -> None:
    """Undo `adapt` or `adopt`: the same class, the same children, the same instance attributes."""
    del module._modules[CHILD]
    del module.__dict__[_SWITCH]
    if _HOOKS in module.__dict__:
        for hook in module.__dict__.pop(_HOOKS):
            hook.remove()
        return
    module.__class__ = type(module)._weft_base  # type: ignore[attr-defined]
    if INNER_FORWARD in module.__dict__:
        module.__dict__["forward"] = module.__dict__.pop(INNER_FORWARD)


def sites_of(module: nn.Module) -> nn.ModuleDict:
    """The layer's adapters by name."""
    container = module._modules[CHILD]
    if not isinstance(container, nn.ModuleDict):
        raise TypeError(f"{type(module).__name__}.{CHILD} is not Weft's")
    return container


def switch_of(module: nn.Module) -> Switch | None:
    """The switch that an adapted layer reads; None for any other module."""
    return module.__dict__.get(_SWITCH)
