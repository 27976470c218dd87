"""The methods once more, written out from the papers in float64, without a line of the library's
code.

Every function takes W [out, in] and the tensors `t` of one layer, all float64, and returns W';
where a method is no change of weights it takes the layer's input and output and returns the new
output. A method needs an entry here before its tests run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def lora(W: Tensor, t: Tensors, c: Any) -> Tensor:
    """Equation 3 of arXiv:2106.09685, with alpha / r, or alpha / sqrt(r) for rslora: a sum of r
    outer products. With init="pissa" the residual of arXiv:2404.02948, equation 3, takes W's place.
    """
    scale = c.alpha / (math.sqrt(c.r) if c.rslora else c.r)
    total = W
    for k in range(c.r):
        total = total + scale * torch.outer(t["B"][:, k], t["A"][k])
        if "A0" in t:
            total = total - scale * torch.outer(t["B0"][:, k], t["A0"][k])
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
    """Section 3 of arXiv:2210.07558: the first b outer products, scaled by alpha / b; all r where b
    is not said.
    """
    b = c.r if b is None else b
    total = W
    for k in range(b):
        total = total + c.alpha / b * torch.outer(t["B"][:, k], t["A"][k])
    return total


def vera(W: Tensor, t: Tensors, c: Any) -> Tensor:
    """Equation 2 of arXiv:2310.11454: the shared matrices' upper left corners between two diagonal
    ones.
    """
    out, in_ = W.shape
    A, B = t["shared.A"][:, :in_], t["shared.B"][:out, :]
    return W + torch.diag(t["b"]) @ B @ torch.diag(t["d"]) @ A


def renormalised(V: Tensor, t: Tensors, c: Any, norms: Tensor | None = None) -> Tensor:
    """Equation 5 of arXiv:2402.09353, one output unit at a time. `norms` replaces ‖V‖ by constants
    (section 4.3).
    """
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
    "LoRA": lora,
    "VeRA": vera,
    "DoRA": dora,
    "DVoRA": dvora,
    "LoRAFA": lora_fa,
    "AdaLoRA": adalora,
    "DyLoRA": dylora,
}


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
        a = {
            "relu": z * (z > 0),
            "swish": z / (1 + (-z).exp()),
            "tanh": (z.exp() - (-z).exp()) / (z.exp() + (-z).exp()),
            "gelu": z * (1 + torch.erf(z / math.sqrt(2))) / 2,
        }[c.nonlinearity]
        total = total + a[..., None] * t["up"][:, k]
    return y + c.scale * total


def gpt2(x: Tensor, t: Tensors, c: Any) -> Tensor:
    """A GPT-2 with one head on embeddings x [rows, T, d], with virtual positions where the
    configuration says so: equation 3 of arXiv:2101.00190, section 5.1 of arXiv:2106.09685. One
    query at a time, from the tensors' names alone.
    """
    where, length = getattr(c, "where", None), x.shape[1]
    before, after = (c.l_p, c.l_i) if where in ("embeddings", "block") else (0, 0)
    shift = c.n if where == "attention" and c.positions == "shifted" else 0
    if where == "embeddings":
        x = _around(x, t.get("before"), t.get("after"))
    elif where == "block":
        x = _around(x, x.new_zeros(before, x.shape[2]), x.new_zeros(after, x.shape[2]))
    h = x + t["wpe.weight"][shift : shift + x.shape[1]]
    for layer in range(2):
        own = {
            k.removeprefix(f"h.{layer}."): v for k, v in t.items() if k.startswith(f"h.{layer}.")
        }
        if where == "block":
            h = _around(h[:, before : before + length], own.get("before"), own.get("after"))
        h = h + _attention(
            _norm(h, own, "ln_1"), own, _prefix(own, t, c) if where == "attention" else ()
        )
        z = _norm(h, own, "ln_2") @ own["mlp.c_fc.weight"] + own["mlp.c_fc.bias"]
        z = z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        h = h + z @ own["mlp.c_proj.weight"] + own["mlp.c_proj.bias"]
    h = _norm(h, t, "ln_f")
    real = h[:, before : before + length]
    return (
        torch.cat([real[:, :-1], h[:, -1:]], dim=1) if after else real
    )  # behind the prompt stands the last word on it


def _around(x: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
    rows = [p.expand(x.shape[0], -1, -1) if p is not None else x[:, :0] for p in (before, after)]
    return torch.cat([rows[0], x, rows[1]], dim=1)


def _norm(x: Tensor, t: Tensors, name: str) -> Tensor:
    middle = x.mean(dim=-1, keepdim=True)
    spread = ((x - middle) ** 2).mean(dim=-1, keepdim=True)
    return (x - middle) / (spread + 1e-5).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]


def _prefix(own: Tensors, t: Tensors, c: Any) -> tuple[Tensor, Tensor]:
    if c.hidden is None:
        return own["attn.keys"], own["attn.values"]
    middle = torch.tanh(t["shared.E"] @ t["shared.down"].t() + t["shared.b_down"])
    both = middle @ own["attn.up"].t() + own["attn.b_up"]
    return both[:, :11], both[:, 11:]


def _attention(x: Tensor, own: Tensors, prefix: tuple[Tensor, ...]) -> Tensor:
    q, k, v = (x @ own["attn.c_attn.weight"] + own["attn.c_attn.bias"]).split(11, dim=-1)
    out = []
    for i in range(x.shape[1]):
        keys, values = k[:, : i + 1], v[:, : i + 1]
        if prefix:
            keys, values = (
                torch.cat([p.expand(x.shape[0], -1, -1), t], dim=1)
                for p, t in zip(prefix, (keys, values), strict=True)
            )
        scores = (keys * q[:, i : i + 1]).sum(dim=-1) / math.sqrt(11)
        weights = (scores - scores.max(dim=1, keepdim=True).values).exp()
        out.append(((weights / weights.sum(dim=1, keepdim=True))[..., None] * values).sum(dim=1))
    return torch.stack(out, dim=1) @ own["attn.c_proj.weight"] + own["attn.c_proj.bias"]


# Trained numbers of a method with virtual positions, in two blocks of width 11.
PROMPT_FORMULAS: dict[str, Callable[[Any], int]] = {
    "Prefix": lambda c: (
        2 * 2 * c.n * 11
        if c.hidden is None
        else c.n * 11 + c.hidden * 11 + c.hidden + 2 * (22 * c.hidden + 22)
    ),
    "PreEmbed": lambda c: 11 * (c.l_p + c.l_i),
    "PreLayer": lambda c: 2 * 11 * (c.l_p + c.l_i),
}

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
    "Bottleneck:preset=parallel": lambda out, in_, r: r * (in_ + out),
}


def count(variant: str, out: int, in_: int, r: int) -> int:
    r = min(r, 5) if "pissa" in variant else r  # as support.config
    return FORMULAS[variant if variant in FORMULAS else variant.partition(":")[0]](out, in_, r)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in whole numbers of Python (Salmon et al., SC 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (second >> 32) ^ c[1] ^ k[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ c[3] ^ k[1],
            first & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0], c[1], c[2], c[3]
