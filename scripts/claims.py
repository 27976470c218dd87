"""What these methods are sold with, tried on the embedded digits task, each claim with a verdict
and its interval.

Usage: python scripts/claims.py [CLAIM ...]        (all without a name; then make docs-tables)

Writes docs/records/claims.json, from which docs/claims.md is made; claims that are not named keep
what they have there. Thresholds stand in the code, set before the first run. Learning rates are
chosen for every method on validation data, with seeds of their own; a difference is paired over
SEEDS seeds: of one seed, all methods see the same head and batches.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import weft
from weft import methods
from weft.analysis.analyze import roles_of
from weft.analysis.changes import change, changes_of
from weft.analysis.relate import LEVELS, relate
from weft.analysis.report import PRINTED
from weft.compare.bench import Opening, open_bench
from weft.compare.entries import LRS, grown
from weft.compare.statistics import t_interval
from weft.compare.tasks.loop import Recipe, evaluate, train
from weft.methods.base import effective_weight
from weft.methods.projections import Projections

RECORD = Path(__file__).resolve().parent.parent / "docs" / "records" / "claims.json"
SEEDS, TUNING = range(10), range(100, 103)
STEPS, BATCH = 150, 20
WATCHED = (38, 75, 113, 150)  # four checkpoints, as in the paper
MARGIN = 0.01  # accuracy: less than this is "matches"
SEEN, NOT_SEEN, CANNOT_TELL = "seen", "not seen", "cannot tell"
SETTINGS: dict[str, dict[str, Any]] = {
    "Full": {"method": "Full"},
    "LoRA r=8": {"method": "LoRA", "r": 8},
    "DoRA r=8": {"method": "DoRA", "r": 8},
    "DoRA r=4": {"method": "DoRA", "r": 4},
    "VeRA r=16": {"method": "VeRA", "r": 16},
}


@dataclass(frozen=True)
class Finding:
    """`what` was measured; `interval`: 95 % over seeds, None where the value is exact; `rule`: what
    decides the verdict.
    """

    what: str
    value: float
    interval: tuple[float, float] | None
    verdict: str
    rule: str


@dataclass(frozen=True)
class Trained:
    """`changes`: step -> module -> (delta D, delta M). `updates`: module -> W' - W at the end.
    `thin`: its B, of LoRA.
    """

    test: float
    validation: float
    loss: float
    numbers: int
    changes: dict[int, dict[str, tuple[float, float]]]
    updates: dict[str, Tensor]
    thin: dict[str, Tensor]


@cache
def bench() -> Any:
    opened = open_bench(Opening(task="digits", model="digits-vit", most={}, device="cpu"))
    opened.model.eval()
    return opened, tuple(opened.describe()["head"])


@cache
def trained(label: str, lr: float, seed: int) -> Trained:
    """One run of a setting, with its changes at the steps WATCHED."""
    opened, head = bench()
    adapter = opened.attach_new(
        {
            **SETTINGS[label],
            "modules_to_save": list(head),
            **({} if label == "Full" else {"seed": seed}),
        },
        seed,
    )
    changes: dict[int, dict[str, tuple[float, float]]] = {}

    def look(step: int) -> None:
        if step in WATCHED:
            changes[step] = {name: (c.delta_d, c.delta_m) for name, c in changes_of(adapter)}

    try:
        splits, recipe = (
            opened.task.prepared.splits,
            Recipe(steps=STEPS, batch=BATCH, lr=lr, seed=seed),
        )
        train(opened.model, adapter, splits["train"], recipe, look)
        scores = {name: evaluate(opened.model, splits[name]) for name in ("validation", "test")}
        thin = {
            name: site.B.detach().double().clone()
            for name, site in adapter.sites.items()
            if hasattr(site, "B")
        }
        return Trained(
            scores["test"].score,
            scores["validation"].score,
            scores["validation"].loss,
            adapter.num_parameters - adapter.num_head_parameters,
            changes,
            _updates(adapter),
            thin,
        )
    finally:
        weft.detach(opened.model)


@torch.no_grad()
def _updates(adapter: Any) -> dict[str, Tensor]:
    found = {}
    for name, site in adapter.sites.items():
        W = site.base.weight().double()
        found[name] = effective_weight(site.method, W, site) - W
    for name, selected in adapter.selected_tensors.items():
        if not selected.head and name.endswith(".weight") and selected.original.ndim == 2:
            found[name.removesuffix(".weight")] = (selected.trained - selected.original).double()
    return found


@cache
def rate(label: str) -> float:
    """The peak learning rate with the best mean on the validation split, ties by its loss; the grid
    grows at its edges.
    """
    rates = list(LRS[SETTINGS[label]["method"]])
    scored: dict[float, tuple[float, float]] = {}
    for _ in range(4):
        for lr in rates:
            if lr not in scored:
                runs = [trained(label, lr, seed) for seed in TUNING]
                scored[lr] = (mean(r.validation for r in runs), -mean(r.loss for r in runs))
        best = max(scored, key=lambda lr: scored[lr])
        wider = grown(sorted(scored), best)
        if wider is None or wider in scored:
            break
        rates = [wider]
    print(f"{label}: rate {best:g}", file=sys.stderr)
    return best


def runs(label: str) -> list[Trained]:
    return [trained(label, rate(label), seed) for seed in SEEDS]


def over_seeds(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Mean and Student's interval."""
    interval = t_interval(values)
    assert interval is not None
    return mean(values), interval


def at_least(what: str, values: Sequence[float], threshold: float, rule: str) -> Finding:
    value, (low, high) = over_seeds(values)
    verdict = SEEN if low >= threshold else NOT_SEEN if high < threshold else CANNOT_TELL
    return Finding(what, value, (low, high), verdict, rule)


def at_most(what: str, values: Sequence[float], threshold: float, rule: str) -> Finding:
    value, (low, high) = over_seeds(values)
    verdict = SEEN if high <= threshold else NOT_SEEN if low > threshold else CANNOT_TELL
    return Finding(what, value, (low, high), verdict, rule)


# The claims


def svd() -> list[Finding]:
    """LoRA's update is low-rank and like an SVD."""
    full, lora = runs("Full"), runs("LoRA r=8")
    names = list(lora[0].updates)
    energy = [mean(_share(run.updates[name], 8) for name in names) for run in full]
    overlap = [
        mean(_overlap(b.updates[name], f.updates[name], 8) for name in names)
        for f, b in zip(full, lora, strict=True)
    ]
    chance = mean(8 / lora[0].updates[name].shape[0] for name in names)
    cosines = [mean(_cosines(B.t()) for B in run.thin.values()) for run in lora]
    noise = mean(
        _share(
            torch.randn(
                lora[0].updates[name].shape, generator=torch.Generator().manual_seed(i)
            ).double(),
            8,
        )
        for i, name in enumerate(names)
    )
    return [
        at_least(
            "full fine-tuning: share of its update's squared norm in the first 8 of 48 singular "
            "directions "
            f"(random matrices: {noise:.2f})",
            energy,
            0.9,
            "low-rank: at least 0.9",
        ),
        at_least(
            "overlap of the output directions of LoRA's B A with the first 8 of full fine-tuning's "
            "update, same "
            f"seed (by chance: {chance:.2f}; its truncated SVD: 1)",
            overlap,
            0.5,
            "like that SVD: at least 0.5",
        ),
        at_most(
            "mean |cos| between columns of LoRA's trained B (of an SVD: 0; of random ones: about "
            "0.11)",
            cosines,
            0.05,
            "orthogonal as an SVD's: at most 0.05",
        ),
    ]


def _share(update: Tensor, k: int) -> float:
    s = torch.linalg.svdvals(update).square()
    return float(s[:k].sum() / s.sum())


def _overlap(a: Tensor, b: Tensor, k: int) -> float:
    u, v = (torch.linalg.svd(t, full_matrices=False).U[:, :k] for t in (a, b))
    return float((u.t() @ v).square().sum()) / k


def _cosines(rows: Tensor) -> float:
    unit = rows / rows.norm(dim=1, keepdim=True)
    cos = (unit @ unit.t()).abs()
    return float((cos.sum() - cos.diagonal().sum()) / (len(cos) * (len(cos) - 1)))


def orthogonal() -> list[Finding]:
    """Random A and B have nearly orthogonal rows."""
    found = []
    for r, width in ((16, 48), (256, 768), (256, 4096)):
        values = [_cosines(Projections(r, width, width, seed, "weft").A.double()) for seed in SEEDS]
        found.append(
            at_most(
                f"mean |cos| between the {r} rows of A, {width} inputs",
                values,
                0.05,
                "nearly orthogonal: at most 0.05",
            )
        )
    rank = int(torch.linalg.matrix_rank(Projections(1024, 768, 768, 0, "weft").A.double()))
    found.append(
        Finding(
            "independent rows of A at r = 1024 on 768 inputs, the paper's setting for RoBERTa-base",
            rank,
            None,
            NOT_SEEN if rank < 1024 else SEEN,
            "independent: all 1024",
        )
    )
    return found


def freedom() -> list[Finding]:
    """Every update of rank r is a combination of the random bases."""
    found = []
    for out, in_, r in ((7, 5, 2), (16, 12, 4)):
        shared = Projections(r, in_, out, 0, "weft")
        A, B = shared.A.double(), shared.B.double()

        def update(b: Tensor, d: Tensor, A: Tensor = A, B: Tensor = B) -> Tensor:
            return ((b[:, None] * B) @ (d[:, None] * A)).reshape(-1)

        generator = torch.Generator().manual_seed(1)
        at = tuple(torch.randn(n, generator=generator, dtype=torch.float64) for n in (out, r))
        rank = int(
            torch.linalg.matrix_rank(
                torch.cat(torch.autograd.functional.jacobian(update, at), dim=1)
            )
        )
        free, needed = out + r - 1, r * (out + in_ - r)
        found.append(
            Finding(
                f"degrees of freedom of VeRA's update [{out}, {in_}] at r = {r} (out + r - 1 = "
                f"{free}; those "
                f"of all matrices of rank {r}: {needed})",
                rank,
                None,
                SEEN if rank >= needed else NOT_SEEN,
                f"every update of rank {r}: {needed}",
            )
        )
    return found


def vera() -> list[Finding]:
    """VeRA matches LoRA with a tenth of the numbers."""
    lora, small = runs("LoRA r=8"), runs("VeRA r=16")
    value, (low, high) = over_seeds([a.test - b.test for a, b in zip(lora, small, strict=True)])
    share = small[0].numbers / lora[0].numbers
    verdict = SEEN if high < MARGIN else NOT_SEEN if low > 0 else CANNOT_TELL
    return [
        Finding(
            "trained numbers of VeRA r=16 for one of LoRA r=8",
            share,
            None,
            SEEN if share <= 0.1 else NOT_SEEN,
            "a tenth: at most 0.1",
        ),
        Finding(
            f"test accuracy of LoRA r=8 less VeRA r=16, {len(SEEDS)} seeds, paired",
            value,
            (low, high),
            verdict,
            f"matches: less than {MARGIN} behind; not seen: surely behind",
        ),
    ]


def coupling() -> list[Finding]:
    """LoRA moves magnitude and direction together; full fine-tuning and DoRA do not."""
    found = []
    for label, method in (("Full", "Full"), ("LoRA r=8", "LoRA"), ("DoRA r=8", "DoRA")):
        sign = math.copysign(1, PRINTED[method])
        every = [_relations(run) for run in runs(label)]
        for level in LEVELS:
            held = [one[level] for one in every if one[level] is not None]
            value, (low, high) = over_seeds(
                [math.atanh(max(-0.999999, min(0.999999, r))) for r in held]
            )
            ends = sorted((sign * low, sign * high))
            verdict = SEEN if ends[0] > 0 else NOT_SEEN if ends[1] < 0 else CANNOT_TELL
            found.append(
                Finding(
                    f"{label}: correlation of delta D and delta M, query matrices, {level}",
                    math.tanh(value),
                    (math.tanh(low), math.tanh(high)),
                    verdict,
                    f"the paper's sign ({PRINTED[method]:+.2f}, pooled)",
                )
            )
    return found


def noise() -> list[Finding]:
    """What the correlation is of updates that learn nothing: W + t N, of random N, growing with the
    steps t.
    """
    queries = {
        name: module.weight.detach().double()
        for name, module in bench()[0].model.named_modules()
        if name.endswith("q_proj")
    }
    found, forms = [], {"full rank": None, "rank 8": 8}
    for form, r in forms.items():
        every = []
        for seed in SEEDS:
            generator = torch.Generator().manual_seed(seed)
            updates = {
                name: _random(tuple(W.shape), r, generator) * 0.5 * W.norm()
                for name, W in queries.items()
            }
            points = [
                (name, one.delta_d, one.delta_m)
                for step in WATCHED
                for name, W in queries.items()
                for one in [change(W, W + step / STEPS * updates[name])]
            ]
            every.append({one.level: one.r for one in relate(*zip(*points, strict=True))})
        for level in LEVELS:
            z, (low, high) = over_seeds([math.atanh(min(0.999999, one[level])) for one in every])
            verdict = SEEN if low > 0 else NOT_SEEN if high < 0 else CANNOT_TELL
            found.append(
                Finding(
                    f"random updates of {form}, half of W's norm at the end: r of delta D and "
                    "delta M, "
                    f"query matrices, {level}",
                    math.tanh(z),
                    (math.tanh(low), math.tanh(high)),
                    verdict,
                    "positive without any learning",
                )
            )
    return found


def _random(shape: tuple[int, int], r: int | None, generator: torch.Generator) -> Tensor:
    """A random matrix of norm 1."""
    full = torch.randn(shape, generator=generator, dtype=torch.float64)
    if r is not None:
        full = full[:, :r] @ torch.randn(r, shape[1], generator=generator, dtype=torch.float64)
    return full / full.norm()


def _relations(run: Trained) -> dict[str, float | None]:
    """r at each level over the query matrices of a run."""
    roles = roles_of(list(run.changes[WATCHED[0]]))
    points = [
        (name, *pair)
        for held in run.changes.values()
        for name, pair in held.items()
        if roles[name].endswith("q_proj")
    ]
    return {one.level: one.r for one in relate(*zip(*points, strict=True))}


def half_rank() -> list[Finding]:
    """DoRA at half the rank beats LoRA."""
    dora, rule = runs("DoRA r=4"), "beats: surely above 0; not seen: surely below"
    lora = {
        "each at its own rate": runs("LoRA r=8"),
        "both at DoRA's rate": [trained("LoRA r=8", rate("DoRA r=4"), seed) for seed in SEEDS],
    }
    found = []
    for how, others in lora.items():
        value, (low, high) = over_seeds(
            [a.test - b.test for a, b in zip(dora, others, strict=True)]
        )
        verdict = SEEN if low > 0 else NOT_SEEN if high < 0 else CANNOT_TELL
        found.append(
            Finding(
                f"test accuracy of DoRA r=4 less LoRA r=8, {len(SEEDS)} seeds, paired, {how}",
                value,
                (low, high),
                verdict,
                rule,
            )
        )
    return found


def inference() -> list[Finding]:
    """No extra cost at inference."""
    opened, head = bench()
    model, inputs = (
        opened.model,
        {"pixel_values": torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))},
    )
    base, found = _flops(model, inputs), []
    for config in (weft.LoRA(r=8), weft.VeRA(r=16), weft.DoRA(r=8), weft.DVoRA(r=16)):
        name = type(config).__name__
        adapter = opened.attach_new({**methods.to_json(config), "modules_to_save": list(head)}, 0)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(
                    0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
                )
        attached = _flops(model, inputs)
        report = weft.merge(model, verify=inputs)
        merged = _flops(model, inputs)
        weft.unmerge(model)
        weft.detach(model)
        found.append(
            Finding(
                f"{name}, merged: operations of a forward pass, of the base's (unmerged: "
                f"{attached / base:.3f}"
                f"; outputs merged and unmerged differ by {report.output_error:.0e}, relative)",
                merged / base,
                None,
                SEEN if merged == base else NOT_SEEN,
                "no extra cost: exactly 1",
            )
        )
    return found


@torch.no_grad()
def _flops(model: Any, inputs: Mapping[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


CLAIMS: dict[str, Callable[[], list[Finding]]] = {
    "svd": svd,
    "orthogonal": orthogonal,
    "freedom": freedom,
    "vera": vera,
    "coupling": coupling,
    "noise": noise,
    "half-rank": half_rank,
    "inference": inference,
}


def main() -> None:
    chosen = sys.argv[1:] or list(CLAIMS)
    unknown = [name for name in chosen if name not in CLAIMS]
    if unknown:
        sys.exit(f"{unknown[0]!r} is no claim. There are: {', '.join(CLAIMS)}.")
    for name in chosen:
        findings = CLAIMS[name]()
        record = (
            json.loads(RECORD.read_text(encoding="utf-8"))
            if RECORD.is_file()
            else {"schema": 1, "claims": {}}
        )
        record["claims"][name] = {
            "command": f"python scripts/claims.py {name}",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}, torch "
            f"{torch.__version__.partition('+')[0]}",
            "rates": {label: rate(label) for label in USES.get(name, ())},
            "findings": [asdict(one) for one in findings],
        }
        temporary = RECORD.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(RECORD)
        for one in findings:
            print(f"{name}: {one.verdict}: {one.what}: {one.value:.4g} {one.interval or ''}")


# The settings that a claim trains.
USES = {
    "svd": ("Full", "LoRA r=8"),
    "vera": ("LoRA r=8", "VeRA r=16"),
    "coupling": ("Full", "LoRA r=8", "DoRA r=8"),
    "half-rank": ("DoRA r=4", "LoRA r=8"),
}


if __name__ == "__main__":
    main()
