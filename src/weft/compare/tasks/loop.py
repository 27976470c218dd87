"""A plain training loop: AdamW, linear warm-up and decay, the audit, and a loss curve.

All randomness comes from `Recipe.seed`: the order of the batches from its own generator, dropout
from a forked global generator, a new head by `renew`. So a run gives the same bits whatever ran
before it in the process (same machine, same number of threads, CPU; on CUDA if the kernels are
deterministic).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from ...auditing.audit import AUDIT_AFTER, audit, steps_until_audit
from ...auditing.snapshot import Snapshot, snapshot
from ...errors import ConfigError, WeftError
from ...model.adapter import Adapter
from ...model.groups import parameter_groups
from ...model.statistics import in_eval, modes_kept
from ...tasks import Encoded, Labelled
from ...tasks.metrics import of_logits
from ...training import scored
from ...training.losses import DivergedError, mean_entropy
from ...training.sampling import seeded


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. `lr` is the peak rate of the method's tensors, `head_lr` that of the head's.
    `lora_plus` and weight decay act as in `weft.parameter_groups`.
    """

    steps: int = 150
    batch: int = 20
    lr: float = 1e-3
    head_lr: float = 1e-2
    warm_up: float = 0.1
    weight_decay: float = 0.0
    lora_plus: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("steps", AUDIT_AFTER), ("batch", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(
                    f"Recipe({name}={value!r}): {name} must be a whole number, {low} or more."
                )
        for name in ("lr", "head_lr"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise ConfigError(f"Recipe({name}={value!r}): {name} must be a number above 0.")
        if not 0 <= self.warm_up < 1:
            raise ConfigError(
                f"Recipe(warm_up={self.warm_up!r}): warm_up is a share of the steps, in [0, 1)."
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(
                f"Recipe(weight_decay={self.weight_decay!r}): weight_decay must be 0 or a number "
                "above it."
            )


@dataclass(frozen=True)
class Score:
    """The task's metric and the mean loss on one split; None if that was not computed."""

    score: float
    loss: float | None


def train(
    model: nn.Module,
    adapter: Adapter,
    examples: Encoded,
    recipe: Recipe,
    on_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Trains the adapter in place and returns the loss of every step.

    A method whose schedule has no length of its own gets `recipe.steps`. After three steps (more if
    a method needs more) `weft.audit` checks that every declared tensor trains and that the base is
    unchanged. Raises AuditError, and DivergedError as soon as a loss is not finite.
    """
    device = next(model.parameters()).device
    adapter.plan_steps(recipe.steps)
    audit_at = min(recipe.steps, steps_until_audit(adapter))
    optimiser = torch.optim.AdamW(groups(adapter, recipe))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: factor(step, recipe))
    losses: list[float] = []
    before: Snapshot | None = snapshot(model, adapter.name)
    try:
        with modes_kept(model), seeded(recipe.seed, device):
            model.train()
            for step, rows in enumerate(batches(len(examples), recipe), start=1):
                losses.append(_step(model, optimiser, examples, rows, device, step))
                schedule.step()
                if step == audit_at and before is not None:
                    audit(model, before, snapshot(model, adapter.name), adapter.name)
                    before = None
                if on_step is not None:
                    on_step(step)
    finally:
        if before is not None:
            before.release()
    return losses


def _step(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    examples: Encoded,
    rows: Tensor,
    device: torch.device,
    step: int,
) -> float:
    mean = loss_of(model, examples, rows, device)
    value = float(mean.detach())
    if not math.isfinite(value):
        raise DivergedError(f"the loss became {value} at step {step}")
    optimiser.zero_grad(set_to_none=True)
    mean.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return value


def loss_of(model: nn.Module, examples: Encoded, rows: Tensor, device: torch.device) -> Tensor:
    """Returns the mean loss of these rows [n], a scalar []."""
    return forward_loss(model, *on_device(examples, rows, device))


def on_device(
    examples: Encoded, rows: Tensor, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the inputs and the labels of these rows [n] on the device."""
    return {key: value.to(device) for key, value in examples.batch(rows).items()}, examples.wanted(
        rows
    ).to(device)


def forward_loss(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Returns the mean loss [] of one batch; labels [n] or [n, length]."""
    with scored.answering(model, inputs, labels):
        logits = model(**inputs).logits
    return loss(logits, labels)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns a scalar []: the mean cross-entropy of classes [n] from logits [n, classes], the mean
    squared error of scores [n] from [n, 1], or the mean cross-entropy over the tokens in the loss
    of labels [n, length] from [n, length, words].
    """
    if labels.ndim == 2:
        return mean_entropy(logits, labels)
    if labels.is_floating_point():
        return mse_loss(logits.float().squeeze(-1), labels)
    return cross_entropy(logits, labels)


def evaluate(
    model: nn.Module, examples: Labelled, batch: int = 128, metric: str = "accuracy"
) -> Score:
    """Scores a split by a metric of `tasks.metrics`; see `outputs`."""
    return score_of(outputs(model, examples, batch), examples, metric)


def score_of(logits: Tensor, examples: Labelled, metric: str) -> Score:
    """Scores the model's outputs [rows, classes] for a split."""
    return Score(of_logits(metric, logits, examples.labels), float(loss(logits, examples.labels)))


@torch.no_grad()
def outputs(model: nn.Module, examples: Labelled, batch: int = 128) -> Tensor:
    """Returns the model's outputs for a split, [rows, classes] float32 on the CPU, computed in eval
    mode. The mode is restored.
    """
    device = next(model.parameters()).device
    parts = []
    with in_eval(model):
        for rows in torch.split(torch.arange(len(examples.labels)), batch):
            inputs = {key: value.to(device) for key, value in examples.batch(rows).items()}
            parts.append(model(**inputs).logits.float().cpu())
    return torch.cat(parts)


def renew(model: nn.Module, modules: Iterable[str], seed: int) -> None:
    """Gives these modules new initial values, which depend on the seed and their shapes alone.

    Raises WeftError if a module has parameters but no `reset_parameters`.
    """
    device = next(model.parameters()).device
    with seeded(seed, device), torch.no_grad():
        for name in modules:
            for inner, module in model.get_submodule(name).named_modules():
                if not module._parameters:
                    continue
                reset = getattr(module, "reset_parameters", None)
                if reset is None:
                    full = ".".join(part for part in (name, inner) if part)
                    raise WeftError(
                        f"{full!r} ({type(module).__name__}) is to be trained from new values, but "
                        "it has no reset_parameters()."
                    )
                reset()


def groups(adapter: Adapter, recipe: Recipe) -> list[dict[str, Any]]:
    """Returns the optimiser's parameter groups: the method's tensors, and the head's at their own
    rate. An adapter that trains a head alone uses `recipe.lr`.
    """
    heads = [tensor.head for tensor in adapter.selected_tensors.values()]
    alone = not adapter.layers and all(heads)
    return parameter_groups(
        adapter,
        recipe.lr,
        lora_plus=recipe.lora_plus,
        head_lr=recipe.head_lr if any(heads) and not alone else None,
        weight_decay=recipe.weight_decay,
    )


def factor(step: int, recipe: Recipe) -> float:
    """Returns the share of the peak rate at `step` (from 0): a linear rise over the warm-up, then a
    linear decay to 0 at the end.
    """
    warm = round(recipe.warm_up * recipe.steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    return max(0.0, (recipe.steps - step) / max(1, recipe.steps - warm))


def batches(n: int, recipe: Recipe) -> Iterator[Tensor]:
    """Yields `steps` batches of row numbers [batch]: every row once before any row again, in an
    order drawn from the seed.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    waiting = torch.empty(0, dtype=torch.int64)
    size = min(recipe.batch, n)
    for _ in range(recipe.steps):
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(n, generator=generator)])
        rows, waiting = waiting[:size], waiting[size:]
        yield rows
