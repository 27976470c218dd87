"""The floor: a method's equation in the fewest bare torch calls, without a library around it.

LoRA's forward is three calls, x W' + bias, x A', and the sum of the first and h B'. What a library
adds to the floor is what it spends on itself. DoRA's and DVoRA's norm is taken as known: it is
computed once, when the layer is built, and not in the steps that are timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import weft

from .contenders import Contender, attach_awake, equation, expected
from .setup import Setup, layers, twin


class LowRankFloor(nn.Module):
    """y = (x W' + x A' B') and, with m, sigma (y - bias) + bias where sigma = m / norm."""

    inverse: Tensor

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, m: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.m = None if m is None else nn.Parameter(m)
        self.register_buffer("inverse", None if m is None else _inverse(base.weight, B @ A))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        bias = self.bias if self.m is None else None
        y = torch.addmm(F.linear(rows, self.weight, bias), F.linear(rows, self.A), self.B.t())
        if self.m is not None:
            y = torch.addcmul(self.bias, y, self.m * self.inverse)
        return y.view(*x.shape[:-1], -1)


class VectorFloor(nn.Module):
    """The same with the update diag(b) B diag(d) A, of which b and d train."""

    A: Tensor
    B: Tensor
    inverse: Tensor

    def __init__(
        self, base: nn.Linear, A: Tensor, B: Tensor, d: Tensor, b: Tensor, m: Tensor | None
    ) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.register_buffer("A", A)
        self.register_buffer("B", B)
        self.d, self.b = nn.Parameter(d), nn.Parameter(b)
        self.m = None if m is None else nn.Parameter(m)
        update = b[:, None] * (B @ (d[:, None] * A))
        self.register_buffer("inverse", None if m is None else _inverse(base.weight, update))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias if self.m is None else None)
        y = torch.addcmul(y, F.linear(F.linear(x, self.A) * self.d, self.B), self.b)
        return y if self.m is None else torch.addcmul(self.bias, y, self.m * self.inverse)


def _inverse(W: Tensor, update: Tensor) -> Tensor:
    """1 / ‖W + update‖ row by row, [out]."""
    norm: Tensor = torch.linalg.vector_norm(W + update, dim=1)
    return norm.reciprocal()


def floor(name: str, method: str, base: nn.Module, setup: Setup) -> Contender:
    """Returns the contender `floor.METHOD`, with the numbers of Weft's. Raises ValueError for a
    method without one.
    """
    if method not in ("LoRA", "DoRA", "VeRA", "DVoRA"):
        raise ValueError(f"{name!r}: there is a floor for LoRA, DoRA, VeRA and DVoRA.")
    model, source = twin(base), twin(base)
    numbers = {
        n: p.detach().to(setup.torch_dtype, copy=True)
        for n, p in attach_awake(method, source, setup).named_parameters()
    }
    shared = projections(base, setup) if method in ("VeRA", "DVoRA") else {}
    for layer, _, _ in list(layers(base, setup)):
        own = {n.rpartition(".")[2]: t for n, t in numbers.items() if n.startswith(f"{layer}.")}
        parent, _, child = layer.rpartition(".")
        setattr(model.get_submodule(parent), child, _layer(model.get_submodule(layer), own, shared))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return Contender(name, model, trained, equation(method, setup), expected(method, base, setup))


def _layer(base: Any, own: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> nn.Module:
    if shared:
        return VectorFloor(base, shared["A"], shared["B"], own["d"], own["b"], own.get("m"))
    return LowRankFloor(base, own["A"], own["B"], own.get("m"))


def projections(base: nn.Module, setup: Setup) -> dict[str, Tensor]:
    """VeRA's frozen A [r, in] and B [out, r], read from the file that `weft.save` writes for peft."""
    model = twin(base)
    attach_awake("VeRA", model, setup)
    with tempfile.TemporaryDirectory() as folder:
        saved = weft.save(model, Path(folder) / "vera", projections=True)
        tensors = load_file(Path(saved) / "adapter_model.safetensors", device=setup.device)
    found = {key: [t for n, t in tensors.items() if f"vera_{key}" in n] for key in "AB"}
    return {key: tensor.to(setup.torch_dtype) for key, (tensor,) in found.items()}
