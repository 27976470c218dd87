"""The model card of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..tasks.quantize import code as quantize_code
from ..untrusted.printable import one_line
from .adapted import AUTO_CLASSES
from .sources import names_of

_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n", "~", ".")  # not text in YAML


def card(record: Mapping[str, Any], adapter: str, in_peft_format: bool) -> str:
    """Returns README.md of a finished run. `adapter` is the adapter's folder relative to it."""
    config, classes = record["config"], record["classes"]
    base, method = config["model"]["path"], config["method"]["name"]
    lines = [
        "---",
        f"base_model: {_yaml(base)}",
        f"library_name: {'peft' if in_peft_format else 'weft'}",
        "tags: [weft, " + method.lower() + "]",
        "---",
        "",
        f"# {method} adapter for {_markdown(base)}",
        "",
        (
            f"{record['trained_numbers']:,} trained numbers ({record['head_numbers']:,} of them in "
            f"the head), {record['steps_done']} of {record['steps']} steps; seed "
            f"{config['train']['seed']}. Trained with Weft; all settings are in `config.yaml` and "
            "`run.json` of the run."
        ),
        "",
        "## Load it",
        "",
        *_load(record, adapter),
        *(_load_with_peft(adapter) if in_peft_format else _export_to_peft(method, adapter)),
    ]
    if classes:
        named = ", ".join(_markdown(str(name)) for name in classes)
        lines += [f"Classes, in the order of the outputs: {named}.", ""]
    lines += ["## Training", "", *_training(record), "", "## Result", "", *_results(record), ""]
    return "\n".join(lines)


def _load(record: Mapping[str, Any], adapter: str) -> list[str]:
    section, kind, classes = record["config"]["model"], record["kind"], record["classes"]
    base, quantize = section["path"], section.get("quantize")
    labels, text = "", record["format"] != "image"
    if classes:
        labels = f", num_labels={len(classes)}"
    elif kind == "regression":
        labels = ", num_labels=1"
    names, imports = [AUTO_CLASSES[kind], *(["AutoTokenizer"] if text else [])], ["import weft"]
    if quantize is not None:
        how = quantize_code(quantize, section["dtype"])
        names.append(how.partition("(")[0])
        needed = [m for m in ("torch", "torchao.quantization") if f"{m}." in how]
        imports = [*(f"import {module}" for module in needed), *imports]
        labels += f", quantization_config={how}"
    return [
        "```python",
        *imports,
        f"from transformers import {', '.join(sorted(names))}",
        "",
        f"model = {AUTO_CLASSES[kind]}.from_pretrained({_string(base)}{labels})",
        *(
            [f"model.resize_token_embeddings({record['embeddings']})  # for the new tokens"]
            if record.get("embeddings")
            else []
        ),
        f"weft.load(model, {_string(adapter)})",
        *([f"tokenizer = AutoTokenizer.from_pretrained({_string(adapter)})"] if text else []),
        "```",
        "",
    ]


def _load_with_peft(adapter: str) -> list[str]:
    return [
        "With peft:",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        f"model = PeftModel.from_pretrained(model, {_string(adapter)})",
        "```",
        "",
    ]


def _export_to_peft(method: str, adapter: str) -> list[str]:
    return [
        (
            f"peft has no form for {method} as it is saved here. If there is another form, "
            f"`weft export --adapter {adapter} --to peft --out DIR` writes it."
        ),
        "",
    ]


def _training(record: Mapping[str, Any]) -> list[str]:
    config = record["config"]
    data = config["task"] or ", ".join(names_of(config["data"]["train"]))
    optim, train = config["optim"], config["train"]
    rows = {
        "data": f"{_markdown(data)}: {record['samples']} samples, fingerprint {record['identity']['train']}",
        "steps": f"{record['steps']} of {train['batch']} x {train['accumulate']} samples",
        "optimiser": f"AdamW, lr {optim['lr']:g}, {optim['schedule']} with warm-up "
        f"{optim['warm_up']:g}, "
        f"weight decay {optim['weight_decay']:g}"
        + (f", LoRA+ ratio {optim['lora_plus']:g}" if optim.get("lora_plus") else ""),
        "precision": f"{train['precision']}, base weights {config['model']['dtype']}"
        + (
            f", quantised: {config['model']['quantize']}" if config["model"].get("quantize") else ""
        ),
    }
    return [f"- {name}: {text}" for name, text in rows.items()] + [
        f"- {_markdown(note)}" for note in record["notes"]
    ]


def _results(record: Mapping[str, Any]) -> list[str]:
    rows = (
        [f"- training loss of the last logged step: {record['last_loss']:.4f}"]
        if record.get("last_loss")
        else []
    )
    chosen, best = record.get("evaluation"), record["config"]["eval"]["best"]
    if not chosen:
        return [*rows, "- no evaluation data was given"]
    which = f"best by {best}" if best else "last"
    numbers = ", ".join(
        f"{key} {value:.4f}"
        for key, value in chosen.items()
        if isinstance(value, float) and key != "epoch"
    )
    return [*rows, f"- evaluation ({which}, step {chosen['step']}): {numbers}"]


def _yaml(text: str) -> str:
    """A text as a YAML value: as it is if that reads as the same text, else in quotes."""
    plain = re.fullmatch(r"[A-Za-z_./~][\w./~-]*", text) is not None
    return text if plain and text.lower() not in _WORDS else _string(text)


def _string(text: str) -> str:
    """A text as a string of Python, JSON and YAML."""
    return json.dumps(text)


def _markdown(text: str) -> str:
    """A text in a line of Markdown: its own line ends, HTML and markup are shown, not obeyed."""
    return re.sub(r"([\\`*\[\]<>|#!])", r"\\\1", one_line(text, 2000))
