"""What a contender is, Weft's adapters for it, and the gate that it has to pass before it is timed.

A contender is named "<side>.<method>", with a rank of its own if it needs one: "weft.VeRA:256".
factory.py builds contenders from these names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import weft

from .setup import Setup, layers, wake, weft_targets

# small, and large enough that every step moves the numbers: nothing derived from them may be kept
LR = 1e-5
STEPS = (
    10_000  # that a method with a schedule is told, so that all steps clocked lie in its busy phase
)

# Trained numbers of one layer, as the papers count them.
COUNTS: Mapping[str, Callable[[int, int, int], int]] = {
    "LoRA": lambda out, in_, r: r * (out + in_),
    "DoRA": lambda out, in_, r: r * (out + in_) + out,
    "VeRA": lambda out, in_, r: out + r,
    "DVoRA": lambda out, in_, r: 2 * out + r,
    "LoRAFA": lambda out, in_, r: r * out,
    "AdaLoRA": lambda out, in_, r: r * (out + in_ + 1),
    "DyLoRA": lambda out, in_, r: r * (out + in_),
}
# Tolerance of the gate: largest difference of the outputs relative to the largest output.
AGREE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
LARGE, LARGER = ("llama-7b/", "linear-4096"), 2.0  # more sums to round in, more outputs to compare
LEAST_EFFECT = 1e-5  # of an adapter on the outputs; one that is switched off has none at all


def tolerance(setup: Setup) -> float:
    """Returns by how much two contenders of one equation may differ."""
    return AGREE[setup.torch_dtype] * (LARGER if setup.model.startswith(LARGE) else 1.0)


class IdleError(AssertionError):
    """A contender that does not do the work whose time would be taken."""


@dataclass
class Contender:
    """A model ready to be measured. `equation` names what it computes; those of one equation must
    agree.
    """

    name: str
    model: nn.Module
    trained: dict[str, nn.Parameter]
    equation: str
    expected: int
    optimiser: torch.optim.Optimizer | None = None
    after_step: Callable[[], None] | None = None

    def loss(self, data: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = self.model(**data).loss
        return found


def split(name: str, setup: Setup) -> tuple[str, str, Setup]:
    """Side, method, and the setup with the rank that the name may carry."""
    base, _, rank = name.partition(":")
    side, _, method = base.partition(".")
    return side, method, replace(setup, r=int(rank)) if rank else setup


def config(method: str, setup: Setup) -> Any:
    """Weft's configuration of a method by name; "LoRAFA-pre" has its preconditioner on, as peft's
    optimiser has.
    """
    name, _, option = method.partition("-")
    given: dict[str, Any] = {"r": setup.r, "targets": weft_targets(setup), "dropout": setup.dropout}
    if name == "LoRAFA":
        given["precondition"] = option == "pre"
    elif name == "AdaLoRA":
        given |= {"total_steps": STEPS, "warm_up": 0.0}
    return getattr(weft, name)(**given)


def attach_awake(
    method: str, model: nn.Module, setup: Setup, name: str = "default"
) -> weft.Adapter:
    adapter = weft.attach(model, config(method, setup), name=name)
    wake(dict(adapter.named_parameters()))
    return adapter


def expected(method: str, model: nn.Module, setup: Setup) -> int:
    """Trained numbers by the papers' formula, from the model's own layers."""
    count = COUNTS[method.partition("-")[0]]
    return sum(count(out, in_, setup.r) for _, out, in_ in layers(model, setup))


def equation(method: str, setup: Setup) -> str:
    return f"{method.partition('-')[0]}:{setup.r}"


def check(
    contenders: Sequence[Contender], base: nn.Module, data: Mapping[str, Tensor], setup: Setup
) -> None:
    """The gate before any time is taken. Raises IdleError: a wrong number of trained numbers, a
    tensor without a gradient, an adapter that changes nothing, or two contenders of one equation
    that compute different things.
    """
    with torch.no_grad():
        outputs: dict[str, Tensor] = {"base": base(**data).logits}
    for c in contenders:
        _check_trained(c)
        found = _gradients(c, data)
        same = _distance(found, outputs.get(c.equation, found))
        if same > tolerance(setup) and not setup.dropout:  # with dropout each draws its own mask
            raise IdleError(
                f"{c.name} computes something else than the contender of the same equation before "
                "it: the "
                f"outputs differ by {same:.1e}."
            )
        if c.equation != "base" and _distance(found, outputs["base"]) < LEAST_EFFECT:
            raise IdleError(f"{c.name} leaves the base's output as it is.")
        outputs.setdefault(c.equation, found)


def _check_trained(c: Contender) -> None:
    wanting = {id(p) for p in c.model.parameters() if p.requires_grad}
    trained = sum(p.numel() for p in c.trained.values())
    if trained != c.expected or wanting != {id(p) for p in c.trained.values()}:
        raise IdleError(
            f"{c.name} trains {trained:,} numbers in {len(c.trained)} tensors, of {len(wanting)} "
            "that ask for a "
            f"gradient; the formula gives {c.expected:,}."
        )


def _gradients(c: Contender, data: Mapping[str, Tensor]) -> Tensor:
    """The logits of a forward whose backward reached every trained tensor."""
    out = c.model(**data)
    out.loss.backward()
    for name, p in c.trained.items():
        if p.grad is None or not bool(p.grad.isfinite().all()) or not bool(p.grad.any()):
            raise IdleError(f"{c.name}: {name!r} got no gradient, or one that is not finite.")
        p.grad = None
    found: Tensor = out.logits.detach()
    return found


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())
