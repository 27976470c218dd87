"""A whole training run with `transformers.Trainer` and `peft`, as their documentation writes it:
the peer of `weft train` (kinds/training.py), in a process of its own.

`python -m benchmarks.peft_train JSON`; the JSON has model, data, out, steps, batch, lr, r, alpha, dora,
max_length.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

IGNORED = -100


def rows(path: str, tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """The samples as tokens, as TRL makes them: both texts in one piece, split where the prompt's tokens
    end. The loss is on the completion and the end-of-text token.
    """
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        prompt = tokenizer(pair["prompt"])["input_ids"]
        whole = tokenizer(pair["prompt"] + pair["completion"])["input_ids"]
        completion = [*whole[len(prompt) :], tokenizer.eos_token_id]
        ids, labels = [*prompt, *completion], [IGNORED] * len(prompt) + completion
        found.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    return found


def collate(samples: list[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows padded to the longest, input_ids, labels and attention_mask [rows, length]."""

    def padded(values: list[list[int]], value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(v) for v in values], True, value)

    ids = [list(s["input_ids"]) for s in samples]
    return {
        "input_ids": padded(ids, 0),
        "labels": padded([list(s["labels"]) for s in samples], IGNORED),
        "attention_mask": padded([[1] * len(v) for v in ids], 0),
    }


def main(text: str) -> None:
    """Trains, saves the adapter and a checkpoint, and prints what was trained on as JSON."""
    asked = json.loads(text)
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    data = rows(asked["data"], tokenizer, asked["max_length"])
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
    config = LoraConfig(
        r=asked["r"],
        lora_alpha=asked["alpha"],
        target_modules="all-linear",
        use_dora=asked["dora"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    args = TrainingArguments(
        output_dir=asked["out"],
        max_steps=asked["steps"],
        per_device_train_batch_size=asked["batch"],
        learning_rate=asked["lr"],
        lr_scheduler_type="linear",
        logging_steps=1,
        save_strategy="steps",
        save_steps=asked["steps"],
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collate)
    trainer.train()
    model.save_pretrained(f"{asked['out']}/adapter")
    tokenizer.save_pretrained(f"{asked['out']}/adapter")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = int(trainer.state.num_input_tokens_seen)
    print(json.dumps({"trained": trained, "tokens": tokens, "steps": trainer.state.global_step}))


if __name__ == "__main__":
    main(sys.argv[1])
