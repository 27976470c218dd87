"""Products of rows that are sorted by expert with a stack of weights, one weight per expert.

    y = x W_eᵀ for every row x of expert e        y' = σ_e ∘ (y + x A_eᵀ C_eᵀ) + bias_e
                                                   C_e = s diag(b_e) B_e diag(d_e)

`ops/low_rank.py` defines W'_e; the rows of one expert take the products of a layer of its own. A
and B are stacked, [E, r, in] and [E, out, r], or shared by all experts; vectors are [E, r] and [E,
out]. An expert without rows costs nothing and has the gradient 0.

`layer` computes all of it in one autograd function that keeps the input as it came, x A_eᵀ, and
with σ its own output. `update` and `change` are the parts in functions of their own, for dropout
and sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .low_rank import LowRank
from .norm import full_precision


class Groups:
    """Which rows belong to which expert: `ids` [rows], sorted; those from `count` on to none."""

    def __init__(self, ids: Tensor, count: int) -> None:
        ends = torch.bincount(ids, minlength=count)[:count].cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        self.spans = [(i, a, b) for i, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < b]
        self.rows: int = ends[-1] if ends else 0
        self.ids, self.count = ids[: self.rows], count


class Rows:
    """The rows of an input: x [n, in] itself, or those of x that `token` [rows] picks, which are
    not copied all at once.
    """

    def __init__(self, x: Tensor, token: Tensor | None = None) -> None:
        self.x, self.token = x, token

    def all(self) -> Tensor:
        """Returns every row [rows, in]."""
        return self.x if self.token is None else self.x.index_select(0, self.token)


def sorted_by_expert(index: Tensor, count: int) -> tuple[Groups, Tensor]:
    """Returns the groups of a router's choice [tokens, k], and for each row its place among the
    tokens · k choices. Choices that are no expert (a mask) come out as no row.
    """
    ids, order = torch.sort(index.reshape(-1), stable=True)
    groups = Groups(ids, count)
    return groups, order[: groups.rows]


def product(rows: Rows, W: Tensor, groups: Groups, bias: Tensor | None = None) -> Tensor:
    """Returns x W_eᵀ + bias_e [rows, out] for W [E, out, in] and bias [E, out]."""
    return _apply(rows, W, bias, None, None, groups, False)


def layer(
    rows: Rows,
    W: Tensor,
    bias: Tensor | None,
    f: LowRank,
    sigma: Tensor | None,
    groups: Groups,
    keep: bool = False,
) -> Tensor:
    """Returns y' [rows, out] for W [E, out, in], bias and σ [E, out] or None.

    `keep`: the gradient of σ is computed from a copy of y, since y' may be written to later, or
    does not tell it.
    """
    return _apply(rows, W, bias, f, sigma, groups, keep)


def update(x: Tensor, f: LowRank, groups: Groups) -> Tensor:
    """Returns s (x Aᵀ ∘ d) Bᵀ ∘ b [rows, out] in x's dtype, for x [rows, in]."""
    A, B = f.A.to(x.dtype), f.B.to(x.dtype)
    h = product(Rows(x), A, groups) if A.ndim == 3 else F.linear(x, A)
    if f.d is not None:
        h = scaled(h, f.d if f.s == 1.0 else f.s * f.d, groups)
    elif f.s != 1.0:
        h = f.s * h
    up = product(Rows(h), B, groups) if B.ndim == 3 else F.linear(h, B)
    return up if f.b is None else scaled(up, f.b, groups)


def change(x: Tensor, y: Tensor, f: LowRank, sigma: Tensor | None, groups: Groups) -> Tensor:
    """Returns y' - y - bias [rows, out] for y = x W_eᵀ, without the cancellation of that
    difference.
    """
    delta = update(x, f, groups)
    if sigma is None:
        return delta
    return scaled(delta, sigma, groups) + scaled(y, sigma - 1, groups)


def scaled(y: Tensor, v: Tensor, groups: Groups) -> Tensor:
    """Returns y ∘ v_e [rows, n] in y's dtype, for y [rows, n] and v [E, n], which may be wider."""
    found: Tensor = _Scaled.apply(y, v, groups)  # type: ignore[no-untyped-call]
    return found


def with_bias(y: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """Returns y + bias_e [rows, out] for y [rows, out] and bias [E, out]."""
    return y if bias is None else y + bias.to(y.dtype)[groups.ids]


def _apply(
    rows: Rows,
    W: Tensor,
    bias: Tensor | None,
    f: LowRank | None,
    sigma: Tensor | None,
    groups: Groups,
    keep: bool,
) -> Tensor:
    x = rows.x
    factors: tuple[Tensor | None, ...] = (None, None, None, None)
    if f is not None:
        factors = tuple(None if t is None else t.to(x.dtype) for t in (f.A, f.B, f.d, f.b))
    fixed = groups, rows.token, 1.0 if f is None else f.s, keep
    bias = None if bias is None else bias.to(x.dtype)
    found: Tensor = _Layer.apply(x, W, bias, *factors, sigma, *fixed)  # type: ignore[no-untyped-call]
    return found


class _Parts:
    """The tensors of `layer` and what one expert makes of them. A and B are shared only if they are
    frozen, beside trained d and b.
    """

    def __init__(self, tensors: tuple[Any, ...], token: Tensor | None, s: float) -> None:
        self.x, self.W, self.bias, self.A, self.B, self.d, self.b, self.sigma = tensors
        self.token, self.s = token, s
        self.shared = self.A is not None and self.A.ndim == 2

    def rows(self, start: int, end: int) -> Any:
        """x_e [n, in], or None if x was not kept."""
        if self.x is None or self.token is None:
            return None if self.x is None else self.x[start:end]
        return self.x.index_select(0, self.token[start:end])

    def down(self, rows: int) -> Tensor | None:
        """h = x Aᵀ [rows, r] if all share A, else room for it; None without A."""
        if self.A is None:
            return None
        if not self.shared:
            room: Tensor = self.x.new_empty(rows, self.A.shape[1])
            return room
        h: Tensor = self.x @ self.A.t()
        return h if self.token is None else h.index_select(0, self.token)

    def up(self, i: int) -> Tensor:
        """diag(b_e) B_e diag(d_e) [out, r]."""
        C: Tensor = self.B if self.B.ndim == 2 else self.B[i]
        if self.b is not None:
            C = C * self.b[i].unsqueeze(1)
        return C if self.d is None else C * self.d[i]

    def forward(self, i: int, start: int, end: int, y: Tensor, h: Any, own: Tensor | None) -> None:
        """Writes y' of an expert's rows, and its y into `own`."""
        x_e, y_e = self.rows(start, end), y[start:end]
        torch.mm(x_e, self.W[i].t(), out=y_e)
        if h is not None:
            h_e = h[start:end]
            if not self.shared:
                torch.mm(x_e, self.A[i].t(), out=h_e)
            y_e.addmm_(h_e, self.up(i).t(), alpha=self.s)
        if own is not None:
            own[start:end].copy_(y_e)
        if self.sigma is not None:
            y_e.mul_(self.sigma[i])
        if self.bias is not None:
            y_e.add_(self.bias[i])


class _Gradients:
    """The gradients of `layer`: `of` adds those of one expert's rows."""

    def __init__(self, ctx: Any, parts: _Parts, g: Tensor, h: Any, y: Any) -> None:
        self.parts, self.g, self.h, self.y, self.y_is_own = parts, g, h, y, ctx.keep
        p, needs = parts, ctx.needs_input_grad
        tensors = (p.W, p.bias, p.A, p.B, p.d, p.b, p.sigma)
        self.made = [
            torch.zeros_like(t) if t is not None and need else None
            for t, need in zip(tensors, needs[1:8], strict=True)
        ]
        self.W, self.bias, self.A, self.B, self.d, self.b, self.sigma = self.made
        self.x = g.new_zeros(ctx.rows, ctx.width) if needs[0] else None
        self.down = g.new_zeros(len(g), p.A.shape[0]) if p.shared else None  # of h, for all rows

    def of(self, i: int, start: int, end: int) -> None:
        """Adds the gradients of expert i's rows."""
        g, x = self.g[start:end], self.parts.rows(start, end)
        if self.bias is not None:
            torch.sum(g, 0, out=self.bias[i])
        if self.parts.sigma is not None:
            g = self._of_scale(i, start, end, g)
        if self.W is not None:
            torch.mm(g.t(), x, out=self.W[i])
        down = None
        if self.h is not None:
            down = self._of_update(i, start, end, g)
            if self.A is not None:
                torch.mm(down.t(), x, out=self.A[i])
        if self.x is not None:
            self._of_rows(i, start, end, g, down)

    def finish(self) -> None:
        """Adds what all experts' rows have in common: the gradient through a shared A."""
        p, down = self.parts, self.down
        if self.x is None or down is None:
            return
        if p.token is not None:
            down = down.new_zeros(len(self.x), down.shape[1]).index_add_(0, p.token, down)
        self.x.addmm_(down, p.A)

    def _of_scale(self, i: int, start: int, end: int, g: Tensor) -> Tensor:
        """Writes σ's gradient; returns that of y, g ∘ σ."""
        p = self.parts
        if self.sigma is not None:
            y = self.y[start:end]
            if not self.y_is_own:
                y = (y if p.bias is None else y - p.bias[i]) / p.sigma[i]
            torch.sum(g * y, 0, out=self.sigma[i], dtype=self.sigma.dtype)
        found: Tensor = (g * p.sigma[i]).to(g.dtype)
        return found

    def _of_update(self, i: int, start: int, end: int, g: Tensor) -> Tensor:
        """Writes the gradients of B, d and b; returns that of h."""
        p, h = self.parts, self.h[start:end]
        out = None if self.down is None else self.down[start:end]
        down = torch.mm(g, p.up(i), out=out)
        if p.s != 1.0:
            down.mul_(p.s)
        if self.B is not None:
            torch.mm(g.t(), h, out=self.B[i])
            if p.s != 1.0:
                self.B[i].mul_(p.s)
        elif self.d is not None or self.b is not None:
            own = torch.mm(g.t(), h).mul_(p.B if p.B.ndim == 2 else p.B[i]).mul_(p.s)
            if self.b is not None:
                torch.mv(own, p.d[i], out=self.b[i])
            if self.d is not None:
                torch.mv(own.t(), p.b[i], out=self.d[i])
        return down

    def _of_rows(self, i: int, start: int, end: int, g: Tensor, down: Tensor | None) -> None:
        p, x = self.parts, self.x
        assert x is not None
        found = torch.mm(g, p.W[i], out=x[start:end] if p.token is None else None)
        if down is not None and not p.shared:
            found.addmm_(down, p.A[i])
        if p.token is not None:
            x.index_add_(0, p.token[start:end], found)


class _Layer(torch.autograd.Function):
    """`layer` and `product`: x, W, bias, A, B, d, b, σ; then groups, token, s, keep."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        tensors, (groups, token, s, keep) = given[:8], given[8:]
        parts, needs = _Parts(tensors, token, s), ctx.needs_input_grad
        y: Tensor = parts.x.new_empty(groups.rows, parts.W.shape[1])
        trains = parts.sigma is not None and needs[7]
        own = torch.empty_like(y) if trains and keep else None
        with full_precision(y.device):
            h = parts.down(groups.rows)
            for i, start, end in groups.spans:
                parts.forward(i, start, end, y, h, own)
        ctx.groups, ctx.token, ctx.s, ctx.keep = groups, token, s, keep
        ctx.rows, ctx.width = parts.x.shape
        x = parts.x if needs[1] or needs[3] else None
        told = (y if own is None else own) if trains else None
        ctx.save_for_backward(x, *tensors[1:], h, told)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        """Returns the gradients [...] of the inputs."""
        *tensors, h, y = ctx.saved_tensors
        found = _Gradients(ctx, _Parts(tuple(tensors), ctx.token, ctx.s), g, h, y)
        with full_precision(g.device):
            for span in ctx.groups.spans:
                found.of(*span)
            found.finish()
        return found.x, *found.made, None, None, None, None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, v: Tensor, groups: Groups) -> Tensor:
        found = torch.empty_like(y)
        for i, a, b in groups.spans:
            torch.mul(y[a:b], v[i], out=found[a:b])
        ctx.groups = groups
        needs_y, needs_v, _ = ctx.needs_input_grad
        ctx.save_for_backward(y if needs_v else None, v if needs_y else None)
        ctx.shape, ctx.dtype = v.shape, v.dtype
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Returns the gradients [...] of the inputs."""
        y, v = ctx.saved_tensors
        dy = None if v is None else torch.empty_like(g)
        dv = None if y is None else g.new_zeros(ctx.shape, dtype=ctx.dtype)
        for i, a, b in ctx.groups.spans:
            if dy is not None:
                torch.mul(g[a:b], v[i], out=dy[a:b])
            if dv is not None:
                torch.sum(g[a:b] * y[a:b], 0, out=dv[i], dtype=ctx.dtype)
        return dy, dv, None
