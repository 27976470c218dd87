"""A plain training loop: AdamW, linear warm-up and decay, the audit, and a loss curve.

Everything random is drawn from `Recipe.seed`: the order of the batches from a generator of its own,
dropout from a forked global generator, a new head by `renew`. So a run gives the same bits whatever
ran before it in the process (same machine, same number of threads, CPU; on CUDA as far as the
kernels are deterministic).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from ..errors import ConfigError, WeftError
from ..model import prompts
from ..model.adapter import Adapter
from ..tasks import Encoded, Labelled
from ..tasks.metrics import of_logits
from .audit import Snapshot, audit, release, snapshot
from .losses import mean_entropy

AUDIT_AFTER = (
    3  # steps: LoRA's B starts at 0, so A moves from the second step on; the third leaves a margin
)


class DivergedError(WeftError):
    """The loss became infinite or NaN."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. `lr` is the peak rate of the method's own tensors, `head_lr` that of the
    head's. Weight decay acts on matrices; vectors (biases, norms, magnitudes, VeRA's b and d) have
    none, as in `weft train`.
    """

    steps: int = 150
    batch: int = 20
    lr: float = 1e-3
    head_lr: float = 1e-2
    warm_up: float = 0.1
    weight_decay: float = 0.0
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
    """The task's metric and the mean loss on one split, None where it was not computed."""

    score: float
    loss: float | None


def train(
    model: nn.Module,
    adapter: Adapter,
    examples: Encoded,
    recipe: Recipe,
    on_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train the adapter in place and return the loss of every step.

    A method with a schedule that its configuration leaves open gets `recipe.steps`. After three
    steps (more where a method needs more before all has moved) `weft.audit` checks that every
    declared tensor trains and that the base is still. Raises AuditError, or DivergedError as soon
    as a loss is not finite.
    """
    device = next(model.parameters()).device
    adapter.plan_steps(recipe.steps)
    audit_at = min(recipe.steps, max(AUDIT_AFTER, adapter.config.audit_after))
    optimiser = torch.optim.AdamW(groups(adapter, recipe))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: factor(step, recipe))
    losses: list[float] = []
    before: Snapshot | None = snapshot(model, adapter.name)
    was_training = model.training
    model.train()
    try:
        with seeded(recipe.seed, device):
            for step, rows in enumerate(batches(len(examples), recipe), start=1):
                losses.append(_step(model, optimiser, examples, rows, device, step))
                schedule.step()
                if step == audit_at and before is not None:
                    audit(model, before, snapshot(model, adapter.name), adapter.name)
                    before = None
                if on_step is not None:
                    on_step(step)
    finally:
        model.train(was_training)
        if before is not None:
            release(before)
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
    """Mean loss of these rows."""
    return forward_loss(model, *on_device(examples, rows, device))


def on_device(
    examples: Encoded, rows: Tensor, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and labels of these rows."""
    return {key: value.to(device) for key, value in examples.batch(rows).items()}, examples.wanted(
        rows
    ).to(device)


def forward_loss(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Mean loss of one batch. Virtual tokens between prompt and answer learn from the labels where
    the answer begins.
    """
    with prompts.answering(model, labels if labels.ndim == 2 else None):
        logits = model(**inputs).logits
    return loss(logits, labels)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of classes [n] from logits [n, classes], mean squared error of scores [n]
    from [n, 1], or the mean over the tokens in the loss of labels [n, length] from [n, length,
    words].
    """
    if labels.ndim == 2:
        return mean_entropy(logits, labels)
    if labels.is_floating_point():
        return mse_loss(logits.float().squeeze(-1), labels)
    return cross_entropy(logits, labels)


def evaluate(
    model: nn.Module, examples: Labelled, batch: int = 128, metric: str = "accuracy"
) -> Score:
    """Score a split, by a metric of `tasks.metrics`; see `answers`."""
    return score_of(answers(model, examples, batch), examples, metric)


def score_of(logits: Tensor, examples: Labelled, metric: str) -> Score:
    """From the model's outputs for every example of a split."""
    return Score(of_logits(metric, logits, examples.labels), float(loss(logits, examples.labels)))


@torch.no_grad()
def answers(model: nn.Module, examples: Labelled, batch: int = 128) -> Tensor:
    """The model's outputs for a split, float32 on the CPU, in eval mode; the mode is put back."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts = []
    for rows in torch.split(torch.arange(len(examples.labels)), batch):
        inputs = {key: value.to(device) for key, value in examples.batch(rows).items()}
        parts.append(model(**inputs).logits.float().cpu())
    model.train(was_training)
    return torch.cat(parts)


def renew(model: nn.Module, modules: Iterable[str], seed: int) -> None:
    """Give these modules new starting values: a function of the seed and their shapes alone.

    Raises WeftError where a module holds parameters and has no `reset_parameters`.
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
                        f"{full!r} ({type(module).__name__}) is to be trained from new values, and "
                        "it has no "
                        "reset_parameters() that would give them."
                    )
                reset()


def groups(adapter: Adapter, recipe: Recipe) -> list[dict[str, object]]:
    """The optimiser's parameter groups: the method's own tensors, and the head's at their own rate;
    with the recipe's weight decay or without.
    """
    head = {id(tensor.trained) for tensor in adapter.selected_tensors.values() if tensor.head}
    own = [p for p in adapter.parameters() if id(p) not in head]
    rest = [p for p in adapter.parameters() if id(p) in head]
    pairs = ((own, recipe.lr), (rest, recipe.head_lr if own else recipe.lr))
    if not recipe.weight_decay:
        return [
            {"params": tensors, "lr": lr, "weight_decay": 0.0} for tensors, lr in pairs if tensors
        ]
    parts = [
        (
            [p for p in tensors if (p.ndim >= 2) == matrices],
            lr,
            recipe.weight_decay if matrices else 0.0,
        )
        for tensors, lr in pairs
        for matrices in (True, False)
    ]
    return [
        {"params": tensors, "lr": lr, "weight_decay": decay}
        for tensors, lr, decay in parts
        if tensors
    ]


def factor(step: int, recipe: Recipe) -> float:
    """Share of the peak rate at `step` (from 0): linear up over the warm-up, then linear down to 0
    at the end.
    """
    warm = round(recipe.warm_up * recipe.steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    return max(0.0, (recipe.steps - step) / max(1, recipe.steps - warm))


def batches(n: int, recipe: Recipe) -> Iterator[Tensor]:
    """`steps` batches of row numbers; every row once before any row again, in an order drawn from
    the seed.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    waiting = torch.empty(0, dtype=torch.int64)
    size = min(recipe.batch, n)
    for _ in range(recipe.steps):
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(n, generator=generator)])
        rows, waiting = waiting[:size], waiting[size:]
        yield rows


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators at `seed` inside, and as they were outside."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
