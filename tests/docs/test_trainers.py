"""What the README promises of `transformers.Trainer` and TRL's `SFTTrainer` with an attached model."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from documents import small_llama
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import weft

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*'pin_memory' argument.*:UserWarning",
    "ignore:.*`gradient_checkpointing` is deprecated.*:FutureWarning",
)
METHODS = [
    (weft.LoRA(r=8), 1e-2),
    (weft.DoRA(r=8), 1e-2),
    (weft.VeRA(r=64), 1e-1),
    (weft.DVoRA(r=64), 3e-2),
]
USUAL = {"save_strategy": "no", "logging_steps": 1, "num_train_epochs": 2, "disable_tqdm": True}
PAIRS = Dataset.from_list([{"prompt": "The cat", "completion": " sat on the mat."}] * 80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("llama"))


def plain(model, tokenizer, rate, out):
    rows = [tokenizer(row["prompt"] + row["completion"]) for row in PAIRS]
    return Trainer(
        model,
        TrainingArguments(out, learning_rate=rate, **USUAL),
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def supervised(model, tokenizer, rate, out):
    arguments = SFTConfig(out, learning_rate=rate, bf16=False, **USUAL)
    return SFTTrainer(model, arguments, train_dataset=PAIRS, processing_class=tokenizer)


@pytest.mark.parametrize("config", METHODS, ids=lambda c: type(c[0]).__name__)
@pytest.mark.parametrize("trainer_of", [plain, supervised])
def test_a_trainer_trains_the_adapter_and_nothing_else(trainer_of, config, folder, tmp_path):
    config, rate = config
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    base = copy.deepcopy(model.state_dict())
    adapter = weft.attach(model, config, name="mine")
    trainer = trainer_of(model, tokenizer, rate, str(tmp_path / "out"))
    before = weft.snapshot(model)
    trainer.train()

    assert trainer.model is model
    wanted = {id(p) for p in adapter.parameters()}
    groups = trainer.optimizer.param_groups
    assert {id(p) for group in groups for p in group["params"]} == wanted
    assert {id(p) for p in model.parameters() if p.requires_grad} == wanted
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.1
    weft.audit(model, before, weft.snapshot(model))

    model.eval()
    ids = torch.tensor([tokenizer("The cat sat")["input_ids"]])
    with torch.no_grad():
        trained = model(input_ids=ids).logits
    adapter.save(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    weft.load(again, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trained)
    weft.detach(model, "mine")
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())
