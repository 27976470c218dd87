"""Builds contenders by name: the limit, Weft's methods, full fine-tuning, and the peers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from . import peers
from .contenders import COUNTS, LR, Contender, attach_awake, equation, expected, split
from .setup import Setup, twin


def make(name: str, base: nn.Module, setup: Setup) -> Contender:
    """Returns a contender over the weights of `base`, with its adapter moved off its initial
    values. Raises ValueError for an unknown name.
    """
    side, method, setup = split(name, setup)
    if side == "limit":
        found = _limit(name, base)
    elif side == "full":
        found = _full(name, base)
    elif side == "weft" and method.partition("-")[0] in COUNTS:
        found = _weft(name, method, base, setup)
    elif side == "peft":
        found = peers.peft(name, method, base, setup)
    elif side == "dense" and method == "DoRA":
        found = peers.dense_dora(name, base, setup)
    else:
        raise ValueError(
            f"{name!r} is no contender; write limit, full, weft.METHOD, peft.METHOD or dense.DoRA."
        )
    if found.optimiser is None and found.trained:
        found.optimiser = torch.optim.AdamW(found.trained.values(), lr=LR, weight_decay=0.0)
    if setup.checkpointing:
        _checkpoint(found.model)
    if setup.flow or side == "limit":
        _flow(found.model)
    found.model.train()
    return found


def _checkpoint(model: Any) -> None:
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.24 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def _weft(name: str, method: str, base: nn.Module, setup: Setup) -> Contender:
    model = twin(base)
    wanted = expected(method, model, setup)
    adapter = attach_awake(method, model, setup)
    return Contender(name, model, dict(adapter.named_parameters()), equation(method, setup), wanted)


def _limit(name: str, base: nn.Module) -> Contender:
    """Forward and backward with everything frozen but the output of the input embedding: no adapter
    work at all.
    """
    return Contender(name, twin(base), {}, "base", 0)


def _flow(model: Any) -> None:
    """Let the gradient flow back to the output of the input embedding, as if something below it
    were trained.
    """

    def ask(module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            output.requires_grad_(True)

    model.get_input_embeddings().register_forward_hook(ask)


def _full(name: str, base: nn.Module) -> Contender:
    model = copy.deepcopy(base).requires_grad_(True)
    trained = dict(model.named_parameters())
    return Contender(name, model, trained, "base", sum(p.numel() for p in base.parameters()))
