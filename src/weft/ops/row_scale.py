"""How σ = m / ‖W + ΔW‖ of a layer is computed once per optimiser step, and never from a stale norm.

Small layers, frozen factors of more than half the rank of W, and frozen factors of layers whose W'
is built anyway: from the sum V = W + ΔW, which is exact. Others: from ‖W‖, W Aᵀ and A Aᵀ
(`norm.updated_norm`), of which those that only depend on frozen tensors are kept.
In training W Aᵀ is read off the product with the layer's input, which reads W anyway.

In evaluation the cache compares one number per row of W. In training an edit of a large W through
`.data` is caught at the next step: with the product W Aᵀ (or alone, if that is kept) a fixed random
vector v is multiplied, and W v is compared with that of the kept ‖W‖. `stale` is the full check,
for the audit, merge and save.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import Parameter

from . import philox
from .cache import Cache, kept
from .low_rank import LowRank, added, row_scale
from .norm import (
    DENSE_BELOW,
    at_least_float32,
    can_join,
    full_precision,
    joint_product,
    product,
    row_norm,
    updated_norm,
    without_unit,
)
from .scratch import built

_MOVED = 1e-4  # of ‖W‖ per row: a difference of W v that is no rounding
_SAMPLED = 256  # bytes of packed weights that are compared in every call
_vectors: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


class RowScale:
    """σ = m / norm of one layer [out], without its graph; what follows from it, when it is asked
    for.
    """

    def __init__(self, m: Tensor, norm: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._m, self.norm, self._bias, self._dtype = m.detach(), norm, bias, dtype
        self._folded: Tensor | None = None

    @cached_property
    def sigma(self) -> Tensor:
        """σ [out]."""
        return kept(lambda: row_scale(self._m, self.norm))

    @cached_property
    def shift(self) -> Tensor | None:
        """(1 - σ) bias [out], or None without bias."""
        bias = self._bias
        return None if bias is None else kept(lambda: bias - self.sigma * bias)

    @cached_property
    def column(self) -> Tensor:
        """σ [out, 1]."""
        return kept(lambda: self.sigma[:, None])

    def folded(self, f: LowRank) -> Tensor:
        """Returns σ ∘ (s diag(b) B diag(d)) [out, r]; for small layers only, as it is kept."""
        if self._folded is None:
            self._folded = kept(lambda: self.column * f.up(self.sigma.dtype))
        return self._folded

    @cached_property
    def output_tells(self) -> bool:
        """Whether the gradient of σ can be computed from the layer's output."""
        return output_tells(self._m, self.norm, self._bias, self._dtype)


@dataclass(frozen=True, eq=False, slots=True)
class Sources:
    """The tensors that σ depends on: those that train, and W with the others."""

    trained: tuple[Tensor, ...]
    frozen: tuple[Tensor, ...]
    all: tuple[Tensor, ...]

    @classmethod
    def of(cls, f: LowRank, W: Tensor, bias: Tensor | None) -> Sources:
        """Returns the sources of a layer with these factors, W [out, in] and bias [out]."""
        own = [(t, type(t) is Parameter) for t in f.stored()]
        rest = [t for t, trains in own if not trains]
        trained = tuple(t for t, trains in own if trains)
        frozen = (W, *rest) if bias is None else (W, *rest, bias)
        return cls(trained, frozen, trained + frozen)


@dataclass(eq=False, slots=True)
class Ready:
    """By-products for the input at hand, which may be written to: x Wᵀ [tokens, out], or V [out,
    in].
    """

    base: Tensor | None = None
    V: Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class _BaseNorm:
    """‖W‖ [out], the rows that have no unit, and W v [out] of the moment."""

    norm: Tensor
    odd: Tensor
    mark: Tensor


def cached_row_scale(
    f: LowRank,
    W: Tensor,
    bias: Tensor | None,
    cache: Cache,
    training: bool,
    x: Tensor | None = None,
    build: bool = False,
    sources: Sources | None = None,
) -> tuple[RowScale, Ready]:
    """Returns σ of W [out, in] with its factors, and what was computed for x [..., in] on the way.

    `build`: the output of x will be computed through W'. Training and evaluation have norms of
    their own: in training W Aᵀ comes from the product with x, which rounds by the number of tokens,
    so that a run resumed without the evaluation before it finds the same bits.
    """
    ready = Ready()
    sources = Sources.of(f, W, bias) if sources is None else sources

    def compute() -> RowScale:
        assert f.m is not None
        if torch.is_autocast_enabled(W.device.type):
            with full_precision(W.device):
                norm = _norm(W, f, cache, x, build, training, ready)
        else:
            norm = _norm(W, f, cache, x, build, training, ready)
        return RowScale(f.m, norm, bias, W.dtype)

    name = "norm" if training else "norm in use"
    found: RowScale = cache.get(name, sources.trained, sources.frozen, compute, not training)
    return found, ready


def packed_norm(
    f: LowRank, read: Callable[[], Tensor], codes: tuple[Tensor, ...], cache: Cache
) -> Tensor:
    """Returns ‖W + ΔW‖ [out] for a W [out, in] that `read` unpacks from `codes` [...].

    W is unpacked once per optimiser step at most, and once in all if A is frozen. It is not kept.
    """
    unpacked = _Unpacked(read)
    codes = tuple(map(_sample, codes))

    def compute() -> Tensor:
        base: _BaseNorm = cache.get("norm of W", (), codes, lambda: _packed_base(unpacked()))
        dtype = base.norm.dtype
        A = f.A.detach()
        if type(f.A) is Parameter or f.sources:
            known, gram = product(unpacked(), A, dtype), None
        else:
            known = cache.get("W A'", (), (*codes, A), lambda: product(unpacked(), A, dtype))
            gram = cache.get("A A'", (), (A,), lambda: product(A, A, dtype))
        return updated_norm(unpacked, base.norm, A, f.up(dtype).detach(), known, gram, base.odd)

    own = [(t, type(t) is Parameter) for t in f.stored() if t is not f.m]
    trained = tuple(t for t, trains in own if trains)
    frozen = (*codes, *(t for t, trains in own if not trains))
    found: Tensor = cache.get("norm, packed", trained, frozen, compute)
    return found


def _sample(t: Tensor) -> Tensor:
    """Some bytes of t [...], a view: what the cache compares."""
    flat = t.detach().view(-1) if t.is_contiguous() else t.detach()
    flat = flat.view(torch.uint8) if flat.is_contiguous() else flat
    return flat[:: max(1, len(flat) // _SAMPLED)]


class _Unpacked:
    """W [out, in], unpacked when it is first asked for, and for `updated_norm` by rows."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read
        self._W: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._W is None:
            self._W = self._read()
        return self._W

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self()[rows]


def _packed_base(W: Tensor) -> _BaseNorm:
    norm = row_norm(W)
    return _BaseNorm(norm, without_unit(norm), norm)


def stale(f: LowRank, W: Tensor, bias: Tensor | None, cache: Cache) -> bool:
    """Whether a σ that would be used is not that of W [out, in]: W was edited where nothing
    looks.
    """
    if f.m is None:
        return False
    sources = Sources.of(f, W, bias).all
    kept = [cache.fresh(name, sources) for name in ("norm", "norm in use")]
    found = [scale.sigma for scale in kept if isinstance(scale, RowScale)]
    if not found:
        return False
    with torch.no_grad(), full_precision(W.device):
        V = at_least_float32(W) + f.delta(at_least_float32(W).dtype)
        size = row_scale(f.m, row_norm(V))
    return any(bool(((s - size).abs() > 1e-3 * size.abs()).any()) for s in found)


def _norm(
    W: Tensor, f: LowRank, cache: Cache, x: Tensor | None, build: bool, training: bool, ready: Ready
) -> Tensor:
    """Returns ‖W + ΔW‖ [out]; adds to `ready` what the output of x needs too."""
    A, frozen = f.A, type(f.A) is not Parameter and not f.sources
    thick = frozen and (build or 2 * A.shape[0] > W.shape[1])
    if W.numel() < DENSE_BELOW or thick:
        bare = f.d is None and f.b is None and W.dtype is A.dtype is f.B.dtype
        if bare and not build and W.dtype in (torch.float32, torch.float64):
            return row_norm(added(W, f.B, A, f.s))
        exact = at_least_float32(W)
        V = built(exact, A.to(exact.dtype), f.up(exact.dtype))
        ready.V = V if build else None
        return row_norm(V)
    base: _BaseNorm = cache.get("norm of W", (), (W,), lambda: _base_norm(W), not training)
    dtype = base.norm.dtype
    known, gram = None, None
    if frozen:  # these are kept, and cost half of W's memory at most
        gram = cache.get("A A'", (), (A,), lambda: product(A, A, dtype))
        known = cache.get("W A'", (), (W, A), lambda: product(W, A, dtype))
        mark = torch.mv(W.to(dtype), _vector(W, dtype)) if training else base.mark
    elif training and not build and x is not None and can_join(x, W, dtype):
        rows = torch.cat([A.to(dtype), _vector(W, dtype)[None]])
        ready.base, both = joint_product(x, W, rows)
        known, mark = both[:, :-1], both[:, -1]
    elif training:  # apart: a product with one column more costs half as much again
        known, mark = product(W, A, dtype), torch.mv(W.to(dtype), _vector(W, dtype))
    else:
        mark = base.mark
    if mark is not base.mark and _has_moved(mark, base):
        cache.clear()
        ready.base = None
        return _norm(W, f, cache, x, build, training, ready)
    return updated_norm(W, base.norm, A, f.up(dtype), known, gram, base.odd)


def _base_norm(W: Tensor) -> _BaseNorm:
    norm = row_norm(W)
    mark = product(W, _vector(W, norm.dtype)[None], norm.dtype)[:, 0]
    return _BaseNorm(norm, without_unit(norm), mark)


def _vector(W: Tensor, dtype: torch.dtype) -> Tensor:
    """v [in]: numbers between -1 and 1, the same for all layers of one width."""
    key = (W.shape[1], dtype, W.device)
    if key not in _vectors:
        _vectors[key] = philox.uniform(0x5EED, 0, 1, W.shape[1], 1.0, W.device)[0].to(dtype)
    return _vectors[key]


def _has_moved(mark: Tensor, base: _BaseNorm) -> bool:
    return bool(((mark - base.mark).abs() > _MOVED * base.norm).any())


def output_tells(m: Tensor, norm: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether z = y - bias can be recovered from a rounded y = σ z + bias, for the gradient of σ.

    Not if σ is (nearly) 0, nor if the bias is larger than z: |m| = |σ| ‖V‖ is the size of σ z for
    an input of ones. In float16 small numbers lose digits, so there z is always kept.
    """
    if dtype == torch.float16:
        return False
    size = m.detach().abs().to(norm.dtype)
    tells = (size > norm * 2**-10).all()
    if bias is not None:
        tells &= (size >= bias.detach().abs()).all()
    return bool(tells)
