"""Whether a model has the base weights that an adapter was saved with, by the file's fingerprint.

* All numbers equal but for a cast (bfloat16 at the coarsest): it is the same base.
* Not equal, and the weights of one side take few distinct values, as quantised and dequantised weights
  do: it is the same base if they are as near as 4 bits are.
* Else it is another base: other weights, a fine-tuned copy, or one with another adapter merged into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import base_layers
from ..model.packings import packing_of
from . import matching
from .fingerprint import Fingerprint, any_few, before_merge, numbers_of, oriented
from .load_plan import LoadPlan

SWITCH = "pass other_base=True (on the command line --other-base)"
_CAST = 0.0085  # relative: two roundings to bfloat16, which has 8 bits
_TINY = 1e-7  # absolute: float16 has no smaller numbers
_QUANTISED = 0.5  # relative, root mean square: 4 bits make 0.1, other weights 1.4


class _Other(NamedTuple):
    """A tensor with other numbers, and how far they are, relative to the larger norm."""

    name: str
    distance: float
    dims: int


@torch.no_grad()
def compare_base(plan: LoadPlan, other_base: bool = False, switch: str = SWITCH) -> None:
    """Adds a problem to the plan if its model has other base weights than the file's; with
    other_base a note. `switch` says how to ask for that. The base must be active.
    """
    _compare_packing(plan, other_base, switch)
    found = plan.checkpoint.fingerprint
    if found is None:
        return
    live = _live(plan, found)
    compared, others = 0, []
    values = torch.split(found.values.float(), [s.numbers for s in found.sampled])
    for s, saved in zip(found.sampled, values, strict=True):
        now = numbers_of(live[s.name], s) if s.name in live else torch.full_like(saved, torch.nan)
        there = ~(saved.isnan() | now.isnan())
        a, b = saved[there], now[there]
        compared += int(there.any())
        if bool(((a - b).abs() > _CAST * torch.maximum(a.abs(), b.abs()) + _TINY).any()):
            far = (a - b).norm() / torch.maximum(a.norm(), b.norm())
            others.append(_Other(s.name, float(far), len(s.shape)))
    if not compared:
        plan.notes.append("no weight of the base could be compared with the file's fingerprint")
    elif others:
        text = _difference(plan, found, live, others, compared)
        if text is not None and other_base:
            plan.notes.append(f"{text}; used all the same, as other_base asks")
        elif text is not None:
            plan.problems.append(
                f"{text}. Load the adapter's own base, or {switch} to use this one"
            )


def _compare_packing(plan: LoadPlan, other_base: bool, switch: str) -> None:
    """An adapter that began with what quantisation took from the weights makes it good there, and
    would count it twice anywhere else.
    """
    wanted = plan.checkpoint.loftq
    if wanted is None:
        _note_packing(plan)
        return
    for name in plan.configs:
        module = base_layers.holder(plan.modules[name])[0]
        packing = packing_of(module)
        have = "not quantised" if packing is None else packing.label(module)
        if have == wanted:
            continue
        text = (
            f"{name!r} is {have}, and the adapter began with what {wanted} took from the weights "
            "(LoftQ), which is missing there alone"
        )
        if other_base:
            plan.notes.append(f"{text}; used all the same, as other_base asks")
        else:
            plan.problems.append(
                f"{text}. Quantise the base as in training (--quantize, model.quantize), or {switch}"
            )
        return


def _note_packing(plan: LoadPlan) -> None:
    trained = plan.checkpoint.packed
    packed = any(
        packing_of(base_layers.holder(plan.modules[name])[0]) is not None for name in plan.configs
    )
    if trained and plan.configs and not packed:
        plan.notes.append(
            f"the adapter was saved on weights quantised as {', '.join(trained)}, and those here are not "
            "quantised: its outputs are near, and not the same"
        )


def _live(plan: LoadPlan, found: Fingerprint) -> dict[str, Tensor]:
    """The model's tensors by the file's names, as they were before a merge."""
    tensors = plan.parameters
    parents = [s.name.rpartition(".")[0] for s in found.sampled]
    modules = matching.match(list(dict.fromkeys(parents)), plan.modules).found
    names = {}
    for s, parent in zip(found.sampled, parents, strict=True):
        here = modules.get(parent, parent)
        name = f"{here}.{s.name.rpartition('.')[2]}".lstrip(".")
        if name in tensors and tensors[name].is_floating_point():
            names[s.name] = oriented(plan.root, name, tensors[name])
    return before_merge(plan.root, names)


def _difference(
    plan: LoadPlan,
    found: Fingerprint,
    live: Mapping[str, Tensor],
    others: Sequence[_Other],
    compared: int,
) -> str | None:
    """Returns what is different; None, with a note, if that may come from quantisation."""
    far = (sum(o.distance**2 for o in others) / len(others)) ** 0.5
    near = far <= _QUANTISED
    matrices = all(o.dims > 1 for o in others)  # norms and biases are not quantised
    if near and matrices and (found.few or any_few([live[o.name] for o in others])):
        plan.notes.append(
            f"the weights of the base differ by {far:.1%} from those that the adapter was saved "
            "with, as quantised weights do"
        )
        return None
    first = max(others, key=lambda o: o.distance)
    kind = (
        "layers that were drawn anew (not in the checkpoint?) or replaced"
        if 3 * len(others) < compared and not near
        else "a fine-tuned copy, or one with an adapter merged into it"
        if near
        else "another model of this architecture, or one not loaded from its checkpoint"
    )
    return (
        f"{first.name!r}: the base has other weights than the one that the adapter was saved with "
        f"({len(others)} of {compared} tensors compared are {far:.1%} apart): {kind}"
    )
