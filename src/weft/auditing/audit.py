"""The audit: did every declared tensor train, and is the base unchanged?

    before = weft.snapshot(model); train two steps or more; after = weft.snapshot(model);
    weft.audit(model, before, after)

A declared tensor passes if it has had a finite, non-zero gradient since `before` and has moved. A
change alone proves nothing: weight decay moves a tensor that no gradient reaches. LoRA's B starts
at 0, so A's first gradient is 0 and one step is too few. A method with a schedule must have counted
the steps that moved its tensors. The base passes if all its bits are the same, buffers included.

A layer that few backward passes reached (layerdrop, an expert with few tokens) or none (an unused
pooler) has had fewer gradients beside 0 than others. `unreached="allow"` lets it pass and returns
its name. A weight whose bias had gradients while its own were all 0 was given zeros alone
(VL-BART's boxes with CLIP's features): no training can move it, so it passes, and its key is
returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AuditError, ConfigError
from ..model.adapter import STALE_NORM, Adapter
from ..model.attach import adapters
from ..model.saving import MERGED
from ..model.state import state_of
from ..model.steps_watch import unseen
from ..model.wiring import problems as replaced
from .base_digest import adapter_buffers, digest
from .snapshot import Gradients, Snapshot, declared_tensors, frozen_tensors

# LoRA's B starts at 0, so A moves from the second step on; the third is a margin.
AUDIT_AFTER = 3
UNREACHED = ("refuse", "allow")  # values of `unreached`


def steps_until_audit(adapter: Adapter) -> int:
    """Returns the number of steps after which every declared tensor of the adapter has moved."""
    return max(AUDIT_AFTER, int(adapter.config.audit_after))


def audit(
    model: nn.Module,
    before: Snapshot | Mapping[str, Tensor],
    after: Snapshot | Mapping[str, Tensor],
    name: str | None = None,
    unreached: str = "refuse",
) -> list[str]:
    """Raises AuditError, naming the tensors, unless every declared tensor trained and the base's
    bits are the same. Returns the keys of trained weights whose input was zero in every pass; with
    unreached="allow" also the modules that would have failed and that gradients reached never, or
    in fewer backward passes than other modules.

    before, after: from `weft.snapshot`, with two optimiser steps or more between them; or two
    mappings from state_dict keys to tensors [...]. With mappings, gradients are judged by the
    present `.grad`. Raises ConfigError if `unreached` is neither "refuse" nor "allow".
    """
    if unreached not in UNREACHED:
        raise ConfigError(f"audit(unreached={unreached!r}): write one of {list(UNREACHED)}.")
    declared = _Declared()
    changed = [
        text
        for each, adapter in adapters(model).items()
        if name in (None, each)
        for text in replaced(state_of(model), adapter, whole=True)
    ]
    problems = (
        _snapshots(model, before, after, declared)
        if isinstance(before, Snapshot) and isinstance(after, Snapshot)
        else _mappings(model, before, after, name, declared)
    )
    left = declared.unreached()
    problems = changed + declared.problems(unreached == "allow") + problems
    problems += [
        f"{layer}: {STALE_NORM}"
        for each, adapter in adapters(model).items()
        if name in (None, each)
        for layer in adapter.stale_layers()
    ]
    if problems:
        shown = problems[:10] + (
            [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        )
        if left and unreached != "allow":
            shown.append(
                f"Gradients reached {', '.join(left[:8])}{', ...' if len(left) > 8 else ''} never, "
                "or more rarely than other modules: if that is meant (layerdrop, an unused pooler, "
                "an expert without tokens), allow it with audit: {unreached: allow} in weft train, "
                "or weft.audit(..., unreached='allow')."
            )
        raise AuditError("the audit failed:\n  " + "\n  ".join(shown))
    return [*declared.fed_zeros(), *(left if unreached == "allow" else ())]


class _Declared:
    """The problems of the declared tensors by module, and how often gradients reached the modules."""

    def __init__(self) -> None:
        self.by_module: dict[str, list[str]] = {}
        self.reached: dict[str, int] = {}  # largest number of gradients that were not 0
        self.waivable: set[str] = set()
        self.gradients: dict[str, Gradients] = {}
        self.of_key: dict[str, list[str]] = {}

    def add(self, key: str, problems: list[str], gradients: Gradients | None) -> None:
        """Notes a tensor. `gradients` is None if it is not known how many reached it."""
        module = key.rpartition(".")[0]
        self.by_module.setdefault(module, []).extend(problems)
        self.of_key[key] = problems
        if gradients is not None:
            self.gradients[key] = gradients
            self.reached[module] = max(self.reached.get(module, 0), gradients.nonzero)
        if problems and gradients is not None and gradients.finite:
            self.waivable.add(problems[0])

    def unreached(self) -> list[str]:
        """Returns the modules with problems that gradients reached never, or more rarely than
        others.
        """
        most = max(self.reached.values(), default=0)
        return [
            module
            for module, problems in self.by_module.items()
            if problems and self.waivable.issuperset(problems) and self.reached[module] < most
        ]

    def fed_zeros(self) -> list[str]:
        """Returns the weights whose gradient was 0 in all passes while that of their bias was not:
        the gradient of a weight is the output's, which the bias sums, times the input.
        """
        none = Gradients()
        return [
            key
            for key, seen in self.gradients.items()
            if key.endswith(".weight")
            and seen.finite
            and seen.count
            and not seen.nonzero
            and self.gradients.get(f"{key.removesuffix('weight')}bias", none).nonzero
        ]

    def problems(self, allow: bool) -> list[str]:
        """Returns all problems, without those of weights that were given zeros, and of unreached
        modules if these are allowed.
        """
        left = self.unreached() if allow else []
        zeros = {p for key in self.fed_zeros() for p in self.of_key[key]}
        return [
            p
            for m, found in self.by_module.items()
            if m not in left
            for p in found
            if p not in zeros
        ]


def _snapshots(
    model: nn.Module, before: Snapshot, after: Snapshot, declared: _Declared
) -> list[str]:
    before.release()
    after.release()
    problems = []
    for key, old in before.declared.items():
        new = after.declared.get(key)
        if new is None or new.shape != old.shape:
            problems.append(f"{key}: gone or reshaped since the first snapshot")
            continue
        seen = before.gradients[key]
        declared.add(key, _tensor_problem(key, old, new, seen, key in after.frozen), seen)
    problems += [
        f"{key}: base tensor changed" + _moving_buffer(key)
        for key, bits in before.base.items()
        if after.base.get(key) != bits
    ]
    problems += [
        f"{key}: not in the model at the first snapshot, and of no adapter"
        for key in after.base
        if key not in before.base
    ]
    return problems + _uncounted(model, before, after)


def _uncounted(model: nn.Module, before: Snapshot, after: Snapshot) -> list[str]:
    """Problems of adapters with a schedule whose tensors moved without a counted step."""
    problems = []
    for name, adapter in adapters(model).items():
        prefix = next((p for p in (f"{name}: ", "") if p in before.steps), None)
        if prefix is None or before.steps[prefix] != after.steps.get(prefix):
            continue
        own = {
            f"{prefix}{module}.{tensor}"
            for module, site in adapter.layers.items()
            for tensor in site.names
        }
        both = own & before.declared.keys() & after.declared.keys()
        if any(not torch.equal(before.declared[key], after.declared[key]) for key in both):
            problems.append(unseen(name, adapter.config))
    return problems


def _mappings(
    model: nn.Module, before: Any, after: Any, name: str | None, found_in: _Declared
) -> list[str]:
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        raise AuditError(
            "audit(model, before, after): both must be from weft.snapshot(model), or both mappings "
            "from state_dict keys to tensors."
        )
    problems = []
    declared = {id(p): key for key, p in declared_tensors(model, name).items()}
    found, frozen = set(), frozen_tensors(model, name)
    buffers = adapter_buffers(model)
    for key, live in state_of(model).root.state_dict(keep_vars=True).items():
        if key.startswith(MERGED):
            continue
        if key not in before or key not in after:
            problems.append(f"{key}: not in both mappings")
        elif id(live) in declared:
            found.add(id(live))
            seen = Gradients()
            seen.see(live)
            gradients = seen if seen.count else None  # it may have been cleared since
            own = declared[id(live)]
            problem = _tensor_problem(own, before[key], after[key], gradients, own in frozen)
            found_in.add(own, problem, gradients)
        elif id(live) not in buffers and digest(before[key]) != digest(after[key]):
            problems.append(f"{key}: base tensor changed" + _moving_buffer(key))
    return problems + [
        f"{key}: not in the model's state_dict" for i, key in declared.items() if i not in found
    ]


def _tensor_problem(
    key: str, old: Tensor, new: Tensor, gradients: Gradients | None, frozen: bool
) -> list[str]:
    problem = None
    if not bool(torch.isfinite(new).all()):
        problem = "holds NaN or infinity"
    elif gradients is not None and not gradients.count:
        problem = "no gradient reached it (is the layer called, and is the adapter the active one?)"
    elif gradients is not None and not gradients.finite:
        problem = "its gradient was NaN or infinite"
    elif frozen:
        pass
    elif gradients is not None and not gradients.nonzero:
        problem = (
            f"its gradient was zero in all {gradients.count} backward passes (one step is too few "
            "if another factor starts at 0)"
        )
    elif torch.equal(old, new):
        problem = (
            "it has a gradient but did not move (is it in the optimiser, and is the learning rate "
            "above 0?)"
        )
    return [] if problem is None else [f"{key}: {problem}"]


def _moving_buffer(key: str) -> str:
    return (
        " (put BatchNorm layers of the frozen base into eval(), or attach with "
        "freeze_batch_norm=True, in weft train method: {freeze_batch_norm: true})"
        if "running_" in key or "num_batches" in key
        else ""
    )
