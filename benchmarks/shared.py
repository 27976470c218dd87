"""The real model and data in the folder `shared/data` beside the checkout, and what stands in for
them on a machine without it.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .memory import ROOT

DATA = ROOT.parent / "shared" / "data"
STORIES = DATA / "models" / "stories15m"
E2E = DATA / "datasets" / "E2E" / "valid.txt.gz"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")

_NAMES = ("Alimentum", "Blue Spice", "Clowns", "Cotto", "Giraffe", "Strada", "The Mill", "Zizzi")
_FOODS = ("Chinese", "English", "French", "Indian", "Italian", "Japanese")
_AREAS = ("city centre", "riverside")
_PRICES = ("cheap", "moderate", "high", "less than £20", "more than £30")


def has_stories() -> bool:
    """Returns whether the weights of stories15M are on this machine."""
    return (STORIES / "model.safetensors").is_file()


def pairs(count: int) -> tuple[list[dict[str, str]], str]:
    """Returns `count` rows with `prompt` and `completion`, and "E2E" or "synthetic pairs": which
    of the two they are.
    """
    if E2E.is_file():
        with gzip.open(E2E, "rt", encoding="utf-8") as file:
            rows = [_pair(line) for line in itertools.islice(file, count)]
        if len(rows) == count:
            return rows, "E2E"
    return list(itertools.islice(_synthetic(), count)), "synthetic pairs"


def _pair(line: str) -> dict[str, str]:
    meaning, _, text = line.strip().partition("||")
    return {"prompt": f"{meaning.strip()}\n", "completion": text.strip()}


def _synthetic() -> Iterator[dict[str, str]]:
    for name, food, area, price in itertools.cycle(
        itertools.product(_NAMES, _FOODS, _AREAS, _PRICES)
    ):
        yield {
            "prompt": f"name : {name} | food : {food} | area : {area} | price : {price}\n",
            "completion": f"{name} is a place with {food} food in the {area} ; its price is {price} .",
        }


def write_pairs(path: Path, count: int) -> str:
    """Writes `count` pairs as JSON lines and returns what they are."""
    rows, kind = pairs(count)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return kind


def write_model(model: Any, folder: Path, rows: list[dict[str, str]]) -> None:
    """Saves a model with random weights as a `transformers` directory, with a tokenizer whose words
    are those of `rows`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for row in rows for text in row.values() for word in text.split()})
    room = model.config.vocab_size - len(SPECIAL)
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words[:room]])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=model.config.max_position_embeddings,
    )
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
