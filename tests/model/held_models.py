"""Modules that read their weights themselves, and the definition of what an adapter makes of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import oracle


class Kernel(nn.Module):
    """A module of a user's own, which reads a matrix and calls no layer."""

    def __init__(self, in_: int, out: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(out, in_) / in_**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.kernel)


class Attention(nn.Module):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **given)

    def forward(self, x: Tensor) -> Tensor:
        other = x[..., : self.attn.kdim]
        return self.attn(x, other, other)[0]


class Recurrent(nn.Module):
    def __init__(self, cls: type[nn.RNNBase], **given: Any) -> None:
        super().__init__()
        self.rnn = cls(8, 6, batch_first=True, **given)

    def forward(self, x: Tensor) -> Tensor:
        y, h = self.rnn(x)
        return y.sum() + (h[1] if isinstance(h, tuple) else h) ** 2


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(8, 6), nn.GRUCell(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, g = None, None
        for t in range(x.shape[1]):
            h = self.lstm(x[:, t], h)
            g = self.gru(h[0], g)
        return g


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Bilinear(8, 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.pairs(x, x.flip(1))


class Owned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Kernel(8, 7), Kernel(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


ATTENTION = ["in_proj_weight", "out_proj"]
CASES: dict[str, tuple[Any, list[str]]] = {
    "attention": (Attention, ["attn"]),
    "attention, in_proj alone": (Attention, ["in_proj_weight"]),
    "attention, out_proj alone": (Attention, ["out_proj"]),
    "attention of other widths": (lambda: Attention(kdim=5, vdim=5), ["attn"]),
    "LSTM": (lambda: Recurrent(nn.LSTM), ["weight_ih_l0", "weight_hh_l0"]),
    "LSTM, two ways and layers": (
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, proj_size=3),
        ["rnn"],
    ),
    "GRU": (lambda: Recurrent(nn.GRU), ["rnn"]),
    "RNN": (lambda: Recurrent(nn.RNN), ["weight_hh_l0"]),
    "cells": (Cells, ["weight_ih", "weight_hh"]),
    "Bilinear": (Pairs, ["pairs"]),
    "a user's own": (Owned, ["kernel"]),
}


def built(case: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CASES[case][0]().to(dtype)
        for p in model.parameters():
            nn.init.normal_(p, std=0.4)
        return model.requires_grad_(False)  # torch chooses its kernels by that


def inputs(dtype: torch.dtype = torch.float64, rows: int = 3) -> Tensor:
    return torch.randn(rows, 4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def parameter_of(name: str) -> str:
    return f"{name}.weight" if name.endswith("out_proj") else name


def definition(base: nn.Module, adapter: Any, x: Tensor) -> tuple[Tensor, ...]:
    """The output of a copy of the base whose weights are the oracle's W', these by layer [out, in],
    and the leaves behind them.
    """
    leaves = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}
    weights, by_layer = {}, {}
    for name, layer in adapter.layers.items():
        stored = base.get_parameter(parameter_of(name)).detach()
        own = {n: b.double() for n, b in layer.named_buffers() if n not in layer.buffer_names}
        own |= {
            n.removeprefix(f"{name}."): t for n, t in leaves.items() if n.startswith(f"{name}.")
        }
        changed = oracle.ORACLES[type(adapter.config).__name__](
            stored.flatten(1), own, adapter.config
        )
        by_layer[name] = changed
        weights[parameter_of(name)] = changed.view_as(stored)
    return functional_call(copy.deepcopy(base), weights, (x,)), by_layer, leaves
