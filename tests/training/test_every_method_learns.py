"""Every method trains on a small GPT-2, a small Llama and the embedded task: the audit passes and
the loss falls.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import weft
from architectures import ARCHITECTURES, GPT2, transformer
from weft.compare.entries import LRS, OTHER_LRS
from weft.compare.tasks.loop import Recipe, groups, renew, train
from weft.methods import METHODS
from weft.tasks import find_task
from weft.tasks.models import find_model, prepare

TEXT = "the more it snows the more it goes on snowing and nobody knows how cold my toes are growing"
STEPS = 20
# An output head of its own, since a tied one cannot be trained apart.
MODELS = {
    "gpt2": transformer("GPT2LMHeadModel", "GPT2Config", **GPT2, tie_word_embeddings=False),
    "llama": ARCHITECTURES["llama"].build,
}


def configuration(method: str, **given: Any) -> Any:
    """The defaults, but for ranks that fit these narrow models and counts that fit a run this
    short.
    """
    known = {f.name for f in fields(METHODS[method])}
    given = {"r": 16 if method in ("VeRA", "DVoRA") else 4, "k": 1, "n": 4, "l_p": 4, **given}
    return METHODS[method](**{k: v for k, v in given.items() if k in known})


def fallen(losses: list[float], share: float) -> bool:
    """The mean of the last three is below this share of the first."""
    return sum(losses[-3:]) / 3 < share * losses[0]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_on_a_small_language_model(method: str, model: str) -> None:
    built = MODELS[model]()
    if (method, model) == ("BitFit", "llama"):
        with pytest.raises(weft.TargetError, match="no bias vectors"):
            weft.attach(built, configuration(method))
        return
    adapter = weft.attach(built, configuration(method))
    adapter.plan_steps(STEPS)
    letters = sorted(set(TEXT))
    ids = torch.tensor([3 + letters.index(c) for c in TEXT])[:88].view(4, 22)
    before = weft.snapshot(built)
    optimiser = torch.optim.AdamW(
        adapter.parameters(), lr=max(LRS.get(method, OTHER_LRS)), weight_decay=0.0
    )
    losses = []
    built.train()
    for _ in range(STEPS):
        optimiser.zero_grad()
        logits = built(input_ids=ids).logits[:, :-1]
        loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    weft.audit(built, before, weft.snapshot(built))
    # Four vectors in the input of a model that knows nothing can say little.
    assert fallen(losses, 0.9 if hasattr(METHODS[method], "where") else 0.8), losses


@pytest.fixture(scope="module")
def digits() -> Any:
    return prepare(
        find_task("digits").load(), find_model("digits-vit"), {"validation": 5, "test": 5}
    )


@pytest.mark.parametrize("method", METHODS)
def test_on_the_embedded_task(method: str, digits: Any) -> None:
    model = copy.deepcopy(digits.model)
    renew(model, ["classifier"], seed=0)
    adapter = weft.attach(model, configuration(method, modules_to_save=["classifier"]))
    recipe = Recipe(steps=30, lr=LRS.get(method, OTHER_LRS)[1], head_lr=3e-2)
    losses = train(
        model, adapter, digits.splits["train"], recipe
    )  # with the audit after a few steps
    assert fallen(losses, 0.6), losses


def test_weight_decay_acts_on_matrices_alone(digits):
    recipe = Recipe(steps=30, lr=1e-3, weight_decay=0.1)
    adapter = weft.attach(
        copy.deepcopy(digits.model), weft.DoRA(r=2, modules_to_save=("classifier",))
    )
    for group in groups(adapter, recipe):
        assert {(p.ndim >= 2) for p in group["params"]} == {group["weight_decay"] == 0.1}
    assert sum(len(group["params"]) for group in groups(adapter, recipe)) == len(
        list(adapter.parameters())
    )
    with pytest.raises(weft.ConfigError, match="weight_decay must be 0 or"):
        Recipe(weight_decay=-1.0)
