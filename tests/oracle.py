"""The methods once more, written out from the papers in float64, without a line of the library's code.

Every function takes W [out, in] and the tensors `t` of one layer, all float64, and returns W'; where a method is no change
of weights it takes the layer's input and output and returns the new output. A method needs an entry here before its tests
run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def lora(W: Tensor, t: Tensors, c: Any) -> Tensor:
    """Equation 3 of arXiv:2106.09685, with alpha / r, or alpha / sqrt(r) for rslora: a sum of r outer products."""
    scale = c.alpha / (math.sqrt(c.r) if c.rslora else c.r)
    total = W
    for k in range(c.r):
        total = total + scale * torch.outer(t["B"][:, k], t["A"][k])
    return total


def lora_fa(W: Tensor, t: Tensors, c: Any) -> Tensor:
    """LoRA's equation; that A is frozen changes no value (arXiv:2308.03303, section 3)."""
    return lora(W, t, c)


def adalora(W: Tensor, t: Tensors, c: Any) -> Tensor:
    """Equation 3 of arXiv:2303.10512 with LoRA's scale: a sum of r triplets."""
    total = W
    for k in range(c.r):
        total = total + c.alpha / c.r * t["lam"][k, 0] * torch.outer(t["P"][:, k], t["Q"][k])
    return total


def dylora(W: Tensor, t: Tensors, c: Any, b: int | None = None) -> Tensor:
    """Section 3 of arXiv:2210.07558: the first b outer products, scaled by alpha / b; all r where b is not said."""
    b = c.r if b is None else b
    total = W
    for k in range(b):
        total = total + c.alpha / b * torch.outer(t["B"][:, k], t["A"][k])
    return total


def vera(W: Tensor, t: Tensors, c: Any) -> Tensor:
    """Equation 2 of arXiv:2310.11454: the shared matrices' upper left corners between two diagonal ones."""
    out, in_ = W.shape
    A, B = t["shared.A"][:, :in_], t["shared.B"][:out, :]
    return W + torch.diag(t["b"]) @ B @ torch.diag(t["d"]) @ A


def renormalised(V: Tensor, t: Tensors, c: Any, norms: Tensor | None = None) -> Tensor:
    """Equation 5 of arXiv:2402.09353, one output unit at a time. `norms` replaces ‖V‖ by constants (section 4.3)."""
    rows = []
    for i in range(V.shape[0]):
        length = (V[i] * V[i]).sum().sqrt() if norms is None else norms[i]
        rows.append(t["m"][i] * V[i] / length)
    return torch.stack(rows)


def dora(W: Tensor, t: Tensors, c: Any) -> Tensor:
    return _over(lora(W, t, c), t, c)


def dvora(W: Tensor, t: Tensors, c: Any) -> Tensor:
    """DoRA over VeRA, section 5.4."""
    return _over(vera(W, t, c), t, c)


def _over(V: Tensor, t: Tensors, c: Any) -> Tensor:
    if c.norm_grad == "exact":
        return renormalised(V, t, c)
    return renormalised(V, t, c, t.get("norms", V.detach().pow(2).sum(1).sqrt()))


ORACLES: dict[str, Callable[[Tensor, Tensors, Any], Tensor]] = {
    "LoRA": lora, "VeRA": vera, "DoRA": dora, "DVoRA": dvora, "LoRAFA": lora_fa, "AdaLoRA": adalora, "DyLoRA": dylora}



def bottleneck(x: Tensor, y: Tensor, t: Tensors, c: Any) -> Tensor:
    """Houlsby's figure 2, and its relatives: one hidden unit at a time."""
    h = x if c.place == "parallel" else y
    if c.layer_norm:
        middle = h.mean(dim=-1, keepdim=True)
        spread = ((h - middle) ** 2).mean(dim=-1, keepdim=True)
        h = (h - middle) / (spread + 1e-5).sqrt() * t["gain"] + t["shift"]
    total = t.get("b_up", torch.zeros(y.shape[-1], dtype=y.dtype))
    for k in range(c.r):
        z = (h * t["down"][k]).sum(dim=-1) + (t["b_down"][k] if c.bias else 0)
        a = {"relu": z * (z > 0), "swish": z / (1 + (-z).exp()), "tanh": (z.exp() - (-z).exp()) / (z.exp() + (-z).exp()),
             "gelu": z * (1 + torch.erf(z / math.sqrt(2))) / 2}[c.nonlinearity]
        total = total + a[..., None] * t["up"][:, k]
    return y + c.scale * total


FORWARDS: dict[str, Callable[[Tensor, Tensor, Tensors, Any], Tensor]] = {"Bottleneck": bottleneck}

# Trained numbers of one layer, of a method or of one of its variants.
FORMULAS: dict[str, Callable[[int, int, int], int]] = {
    "LoRA": lambda out, in_, r: r * (in_ + out),
    "VeRA": lambda out, in_, r: out + r,
    "DoRA": lambda out, in_, r: r * (in_ + out) + out,
    "DVoRA": lambda out, in_, r: 2 * out + r,
    "LoRAFA": lambda out, in_, r: r * out,
    "AdaLoRA": lambda out, in_, r: r * (in_ + out + 1),
    "DyLoRA": lambda out, in_, r: r * (in_ + out),
    "Bottleneck": lambda out, in_, r: 2 * out * r + r + out,
    "Bottleneck:preset=lin": lambda out, in_, r: 2 * out * r + r + out + 2 * out,
    "Bottleneck:preset=series": lambda out, in_, r: 2 * out * r,
    "Bottleneck:preset=parallel": lambda out, in_, r: r * (in_ + out)}


def count(variant: str, out: int, in_: int, r: int) -> int:
    return FORMULAS[variant if variant in FORMULAS else variant.partition(":")[0]](out, in_, r)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in whole numbers of Python (Salmon et al., SC 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & 0xFFFFFFFF, (first >> 32) ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0], c[1], c[2], c[3]
