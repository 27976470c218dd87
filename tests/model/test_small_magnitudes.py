"""DoRA and DVoRA in bfloat16 with an m far below the norm of V: as near to the exact output as the merged
weight, whose output is rounded once.
"""

from __future__ import annotations

import copy

import pytest
import torch

import weft
from support import KINDS, distance, host, inputs, move, reference_paths

WAYS = ("direct", "rows", "autocast", "definition")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [weft.DoRA, weft.DVoRA])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gradients", [False, True])
def test_small_m_in_bfloat16(kind, method, way, gradients, monkeypatch):
    reference_paths(monkeypatch, "1" if way == "definition" else "0")
    for ratio in (0.1, 0.01, 0.001):
        torch.manual_seed(0)
        model = torch.nn.Sequential(host(kind, 7, 11)).bfloat16()
        adapter = weft.attach(model, method(r=3, targets=["0"]))
        move(weft.attach(model, weft.LoRA(r=2, targets=["0"]), name="other"))
        move(adapter)
        with torch.no_grad():
            for name, p in adapter.named_parameters():
                if name.endswith(".m"):
                    p.mul_(ratio)
        x = inputs(kind, rows=2)
        x = x.bfloat16() if x.is_floating_point() else x
        weft.use(model, "default")
        layer = adapter.layers["0"]
        W = layer.factors().weight(layer.base.weight().detach()).double()
        bias = layer.base.bias
        bias = 0 if bias is None else bias.detach().double()
        exact = W.T[x] if kind == "embedding" else x.double() @ W.T + bias
        merged = copy.deepcopy(model)
        weft.merge(merged)
        with torch.no_grad():
            once = merged(x)
        weft.use(model, ["default", "other"] if way == "rows" else "default")
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast")
        with torch.set_grad_enabled(gradients), autocast:
            found = model(x)
        row = slice(1) if way == "rows" else slice(None)
        for own in (0, bias):  # of the output, and of the part of it that σ scales
            off = distance(found[row].double() - own, exact[row] - own)
            assert off <= 2 * distance(once[row].double() - own, exact[row] - own) + 2**-8, ratio
