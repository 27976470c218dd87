"""Small adapters under peft and the same ones under Weft, for the cases in which the two differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from checkpoint_support import logits, peft_of, quiet, wake
from peft import LoraConfig, PeftModel, VeraConfig
from torch import Tensor, nn

import weft
from support import inputs, net

VERSION = "0.21.2"
ON_NET = {"target_modules": ["layer", "mid"]}


def peft_still(does: bool, what: str) -> None:
    """In the version that this list is about it must be so; another version may have mended it."""
    if not does and peft.__version__ != VERSION:
        pytest.skip(f"peft {peft.__version__} no longer does this: {what}")
    assert does, what


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 5, **ON_NET, **changes})


def vera(**changes: Any) -> VeraConfig:
    return VeraConfig(**{"r": 3, "d_initial": 0.3, **ON_NET, **changes})


def loads(build: Callable[[], nn.Module], directory: Path) -> tuple[Any, list[str]]:
    """What peft makes of a directory, and what it says."""
    with quiet() as said:
        model = PeftModel.from_pretrained(build(), str(directory)).eval()
    return model, said


def two(first: Any, second: Any) -> Any:
    """Two adapters in one peft model, both off their starting points."""
    model = peft_of(net(), first, name="a")
    with quiet():
        model.add_adapter("b", second)
        model.set_adapter("b")
    wake(model, 9)
    return model.eval()


def under(model: Any, name: str, x: Tensor | None = None) -> Tensor:
    model.set_adapter(name)
    return logits(model, inputs("linear") if x is None else x)


def mine_of(theirs: Any, folder: Path, names: tuple[str, ...] = ("a", "b")) -> nn.Module:
    """The same adapters in a Weft model."""
    with quiet():
        theirs.save_pretrained(str(folder))
    model = net()
    for name in names:
        weft.load(model, folder / name, name=name)
    return model
