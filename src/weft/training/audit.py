"""The audit: did every declared tensor train, and did the base stay still?

    before = weft.snapshot(model); train two steps or more; after = weft.snapshot(model);
    weft.audit(model, before, after)

A declared tensor passes if it has had a finite, non-zero gradient since `before` and has moved.
Moving alone is no proof: weight decay moves a tensor that no gradient ever reached. LoRA's B starts
at 0, so A's first gradient is 0 and one step is too few. A method with a schedule must have seen
the steps that moved its tensors. The base passes if all its bits, buffers included, are the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AuditError
from ..model.adapter import Adapter
from ..model.attach import adapters
from ..model.state import base_only, find_state, state_of, unwrapped
from ..model.stepping import follows
from ..model.steps_watch import unseen


@dataclass
class Gradients:
    """What one declared tensor's gradient has been since the snapshot."""

    finite: bool = True
    nonzero: bool = False
    count: int = 0

    def see(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            grad = parameter.grad.detach()
            self.count += 1
            self.finite &= bool(torch.isfinite(grad).all())
            self.nonzero |= bool(grad.count_nonzero())


@dataclass
class Snapshot:
    """Copies of the declared tensors, digests of the base's bits, the steps that adapters with a
    schedule have counted (by what their tensors' keys begin with), the tensors that a rule itself
    keeps still, and the gradients seen since.
    """

    declared: dict[str, Tensor]
    base: dict[str, tuple[int, int]]
    steps: dict[str, int] = field(default_factory=dict)
    still: set[str] = field(default_factory=set)
    gradients: dict[str, Gradients] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)


def snapshot(model: nn.Module, name: str | None = None) -> Snapshot:
    """Record the declared tensors of the adapter `name` (all adapters if None) and the base, and
    watch gradients.
    """
    declared = _declared(model, name)
    shot = Snapshot(
        {k: p.detach().clone() for k, p in declared.items()},
        base_digests(model),
        _steps(model, name),
        _still(model, name),
    )
    for key, parameter in declared.items():
        record = shot.gradients[key] = Gradients()
        shot.hooks.append(parameter.register_post_accumulate_grad_hook(record.see))  # type: ignore[no-untyped-call]
    return shot


def audit(
    model: nn.Module,
    before: Snapshot | Mapping[str, Tensor],
    after: Snapshot | Mapping[str, Tensor],
    name: str | None = None,
) -> None:
    """Raise AuditError, naming the tensors, unless every declared tensor trained and the base's
    bits are the same.

    before, after: from `weft.snapshot`, with two optimiser steps or more between them; or two
    mappings of tensors by state_dict key, in which case gradients are judged by what `.grad` holds
    now.
    """
    problems = (
        _snapshots(model, before, after)
        if isinstance(before, Snapshot) and isinstance(after, Snapshot)
        else _mappings(model, before, after, name)
    )
    if problems:
        shown = problems[:10] + (
            [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        )
        raise AuditError("the audit failed:\n  " + "\n  ".join(shown))


def release(shot: Snapshot) -> None:
    """Stop watching gradients."""
    for hook in shot.hooks:
        hook.remove()
    shot.hooks.clear()


def _chosen(model: nn.Module, name: str | None) -> dict[str, Adapter]:
    """What the keys of its tensors begin with -> adapter."""
    state = state_of(model)
    chosen = adapters(model) if name is None else {name: state.adapter(name)}
    return {
        "" if len(chosen) == 1 else f"{adapter}: ": handle for adapter, handle in chosen.items()
    }


def _declared(model: nn.Module, name: str | None) -> dict[str, nn.Parameter]:
    return {
        f"{begin}{key}": p
        for begin, handle in _chosen(model, name).items()
        for key, p in handle.named_parameters()
    }


def _steps(model: nn.Module, name: str | None) -> dict[str, int]:
    return {
        begin: handle.steps
        for begin, handle in _chosen(model, name).items()
        if follows(handle) and any("step" in site.buffer_names for site in handle.layers.values())
    }


def _still(model: nn.Module, name: str | None) -> set[str]:
    return {
        f"{begin}{module}.{tensor}"
        for begin, handle in _chosen(model, name).items()
        for module, site in handle.layers.items()
        for tensor in site.method.unmoved(site)
    }


def base_digests(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Digests of everything that is not an adapter's: parameters (pretrained values) and persistent
    buffers.
    """
    state = find_state(model)
    root = unwrapped(model) if state is None else state.root
    with base_only(state), torch.no_grad():
        kept = root.state_dict(keep_vars=True)
        ours = {id(p) for a in adapters(model).values() for p in a.parameters()} | _carried(model)
        return {
            key: _digest(t)
            for key, t in kept.items()
            if isinstance(t, Tensor) and id(t) not in ours
        }


def base_fingerprint(digests: Mapping[str, tuple[int, int]], missing: Collection[str]) -> str:
    """16 hex digits over the digests of the pretrained tensors; `missing` are those that no
    checkpoint had.
    """
    held = sorted((name, digest) for name, digest in digests.items() if name not in missing)
    return sha256(repr(held).encode()).hexdigest()[:16]


def _carried(model: nn.Module) -> set[int]:
    """What adapters carry from step to step beside their trained tensors; it lies in the state_dict
    and is no base.
    """
    return {
        id(b)
        for adapter in adapters(model).values()
        for site in adapter.layers.values()
        for b in site.buffers()
    }


def _digest(t: Tensor) -> tuple[int, int]:
    """Two wrapping sums over the bits: any single change is seen, and so is any exchange of two
    elements.
    """
    if t.numel() == 0 or t.is_meta:
        return (0, t.numel())
    flat = t.detach().contiguous().reshape(-1)
    whole = flat.numel() * flat.element_size() // 8 * 8
    raw = flat.view(torch.uint8)
    words = (
        raw[:whole].view(torch.int64)
        if raw.storage_offset() % 8 == 0
        else raw[:whole].clone().view(torch.int64)
    )
    tail = raw[whole:].to(torch.int64)
    weight = torch.arange(words.numel(), device=t.device, dtype=torch.int64) * 2 + 1
    return int(words.sum() + tail.sum()), int(
        (words * weight).sum() + (tail * torch.arange(1, tail.numel() + 1, device=t.device)).sum()
    )


def _snapshots(model: nn.Module, before: Snapshot, after: Snapshot) -> list[str]:
    release(before)
    release(after)
    problems = []
    for key, old in before.declared.items():
        new = after.declared.get(key)
        if new is None or new.shape != old.shape:
            problems.append(f"{key}: gone or reshaped since the first snapshot")
            continue
        problems += _tensor_problems(key, old, new, before.gradients[key], key in after.still)
    problems += [
        f"{key}: base tensor changed" + _moving_buffer(key)
        for key, digest in before.base.items()
        if after.base.get(key) != digest
    ]
    return problems + _uncounted(model, before, after)


def _uncounted(model: nn.Module, before: Snapshot, after: Snapshot) -> list[str]:
    """Adapters with a schedule whose tensors have moved while they counted no step."""
    problems = []
    for name, adapter in adapters(model).items():
        begin = next((b for b in (f"{name}: ", "") if b in before.steps), None)
        if begin is None or before.steps[begin] != after.steps.get(begin):
            continue
        own = {
            f"{begin}{module}.{tensor}"
            for module, site in adapter.layers.items()
            for tensor in site.names
        }
        both = own & before.declared.keys() & after.declared.keys()
        if any(not torch.equal(before.declared[key], after.declared[key]) for key in both):
            problems.append(unseen(name, adapter.config))
    return problems


def _mappings(model: nn.Module, before: Any, after: Any, name: str | None) -> list[str]:
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        raise AuditError(
            "audit(model, before, after): both must be from weft.snapshot(model), or both mappings "
            "of "
            "tensors by state_dict key."
        )
    problems = []
    declared = {id(p): key for key, p in _declared(model, name).items()}
    found, still = set(), _still(model, name)
    for key, live in state_of(model).root.state_dict(keep_vars=True).items():
        if key not in before or key not in after:
            problems.append(f"{key}: not in both mappings")
        elif id(live) in declared:
            found.add(id(live))
            seen = Gradients()
            seen.see(live)
            problems += _tensor_problems(
                declared[id(live)],
                before[key],
                after[key],
                seen if seen.count else None,
                declared[id(live)] in still,
            )
        elif id(live) not in _carried(model) and _digest(before[key]) != _digest(after[key]):
            problems.append(f"{key}: base tensor changed" + _moving_buffer(key))
    return problems + [
        f"{key}: not in the model's state_dict" for i, key in declared.items() if i not in found
    ]


def _tensor_problems(
    key: str, old: Tensor, new: Tensor, gradients: Gradients | None, still: bool
) -> list[str]:
    if not bool(torch.isfinite(new).all()):
        return [f"{key}: holds NaN or infinity"]
    if gradients is not None and not gradients.count:
        return [
            (
                f"{key}: no gradient reached it (is the layer called, and is the adapter the active "
                "one?)"
            )
        ]
    if gradients is not None and not gradients.finite:
        return [f"{key}: its gradient was NaN or infinite"]
    if still:
        return []
    if gradients is not None and not gradients.nonzero:
        why = "one step is too few where another factor starts at 0"
        return [f"{key}: its gradient was zero in all {gradients.count} backward passes ({why})"]
    if torch.equal(old, new):
        return [
            (
                f"{key}: it has a gradient but did not move (is it in the optimiser, and is the "
                "learning rate above 0?)"
            )
        ]
    return []


def _moving_buffer(key: str) -> str:
    return (
        " (put BatchNorm layers of the frozen base into eval())"
        if "running_" in key or "num_batches" in key
        else ""
    )
