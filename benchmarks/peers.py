"""The peers: `peft` at the installed version, reading the adapter that Weft saved, and DoRA with
the dense B A.

So the numbers of a peer are those of Weft's contender, and the gate (contenders.check) can hold
their outputs together.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft

from .contenders import LR, Contender, attach_awake, equation, expected, split
from .setup import Setup, twin


def peft(name: str, method: str, base: nn.Module, setup: Setup) -> Contender:
    """peft's implementation of a method. Raises ValueError where peft has none."""
    if method not in ("LoRA", "DoRA", "VeRA", "AdaLoRA", "LoRAFA"):
        raise ValueError(f"peft has no {method}.")
    wanted = expected(method, base, setup)
    with tempfile.TemporaryDirectory() as folder:
        directory = save_for_peft(method, base, setup, Path(folder))
        model = load_peft(base, directory)
    made = _lorafa(model, setup) if method == "LoRAFA" else None
    # AdaLoRA's `ranknum` is a parameter of peft's that nothing trains by the equation.
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n}
    for n, p in model.named_parameters():
        p.requires_grad_(n in trained)
    after = _allocation(model) if method == "AdaLoRA" else None
    # peft's AdaLoRA adds its orthogonality loss to the loss and not to the logits, so those agree
    # with Weft's.
    return Contender(name, model, trained, equation(method, setup), wanted, made, after)


def save_for_peft(method: str, base: nn.Module, setup: Setup, folder: Path) -> Path:
    """Weft's adapter, off its start, in a directory that peft reads."""
    model = twin(base)
    attach_awake(method, model, setup)
    if method != "LoRAFA":
        return weft.save(model, folder / "saved", projections=method == "VeRA")
    weft.save(model, folder / "fa")
    weft.export(folder / "fa", "peft", folder / "saved")
    return folder / "saved"


def load_peft(base: nn.Module, directory: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # peft says that VeRA's matrices were found in the file, and the like
        return PeftModel.from_pretrained(twin(base), str(directory), is_trainable=True)


def _lorafa(model: Any, setup: Setup) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    made: torch.optim.Optimizer = create_lorafa_optimizer(
        model, r=setup.r, lora_alpha=setup.r, lr=LR
    )
    return made


def _allocation(model: Any) -> Callable[[], None]:
    steps = count(1)

    def after() -> None:
        model.base_model.update_and_allocate(next(steps))

    return after


class Dense(nn.Module):
    """DoRA as its equation reads: B A in full, the norm of W + s B A in every forward, one product
    with W'.
    """

    def __init__(self, base: Any, A: Tensor, B: Tensor, m: Tensor, s: float) -> None:
        super().__init__()
        self.base, self.s = base, s
        self.A, self.B, self.m = (nn.Parameter(t.detach().clone()) for t in (A, B, m))

    def forward(self, x: Tensor) -> Tensor:
        W = self.base.weight if isinstance(self.base, nn.Linear) else self.base.weight.t()
        V = W + self.s * (self.B @ self.A)
        scaled = (self.m / torch.linalg.vector_norm(V, dim=1).detach())[:, None] * V
        return F.linear(x, scaled.to(x.dtype), self.base.bias)


def dense_dora(name: str, base: nn.Module, setup: Setup) -> Contender:
    """Every adapted layer replaced by `Dense`, with the numbers of Weft's DoRA."""
    if setup.dropout:
        raise ValueError(f"{name}: W' in one product has no place for dropout of the update alone.")
    _, _, setup = split(name, setup)
    source = twin(base)
    numbers = dict(attach_awake("DoRA", source, setup).named_parameters())
    model = twin(base)
    for site in sorted({n.rpartition(".")[0] for n in numbers}):
        A, B, m = (numbers[f"{site}.{tensor}"] for tensor in "ABm")
        parent, _, child = site.rpartition(".")
        setattr(model.get_submodule(parent), child, Dense(model.get_submodule(site), A, B, m, 1.0))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return Contender(name, model, trained, equation("DoRA", setup), expected("DoRA", base, setup))
