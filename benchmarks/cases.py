"""The cases: what is measured, and what it has to show. small_work.py has those of small work.

`QUICK` has every row of the table; `FULL` adds every shape, one factor varied at a time around a
base point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from . import small_work
from .case import Case
from .claims import Claim
from .kinds import mixed
from .setup import Setup

MERGED = ("LoRA", "DoRA", "VeRA:256", "DVoRA:256", "LoRAFA", "AdaLoRA", "DyLoRA")
SMALL, WIDE = Setup(), Setup(model="llama-1024")


def _dora(tokens: int, at_most: float) -> Claim:
    return Claim(
        f"DoRA, {tokens} tokens / LoRA",
        "step",
        "weft.DoRA",
        "weft.LoRA",
        at_most,
        ("peft.DoRA", "weft.LoRA"),
        headline=tokens == 4096,
    )


def _vera(tokens: int, at_most: float) -> Claim:
    return Claim(
        f"VeRA r=256, {tokens} tokens / limit",
        "step",
        "weft.VeRA:256",
        "limit",
        at_most,
        ("peft.VeRA:256", "limit"),
    )


_STEPS = [
    Case(
        "dora-1024",
        "step",
        SMALL,
        ("limit", "weft.LoRA", "weft.DoRA", "peft.LoRA", "peft.DoRA", "dense.DoRA"),
        (
            Claim(
                "LoRA, 1024 tokens / limit",
                "step",
                "weft.LoRA",
                "limit",
                1.05,
                ("peft.LoRA", "limit"),
                headline=True,
            ),
            _dora(1024, 1.05),
        ),
        weight=12,
    ),
    Case(
        "dora-4096",
        "step",
        replace(SMALL, tokens=4096),
        ("weft.LoRA", "weft.DoRA", "peft.DoRA"),
        (_dora(4096, 1.04),),
        weight=18,
        least=4,
    ),
    Case(
        "dora-128",
        "step",
        replace(SMALL, tokens=128),
        ("limit", "weft.LoRA", "weft.DoRA", "peft.LoRA", "peft.DoRA"),
        (_dora(128, 1.12),),
        weight=5,
    ),
    Case(
        "dora-accumulated",
        "step",
        replace(SMALL, tokens=512, accumulate=8, checkpointing=True),
        ("weft.LoRA", "weft.DoRA"),
        (
            Claim("DoRA, 8 x 512, checkpointed / LoRA", "step", "weft.DoRA", "weft.LoRA", 1.02),
            Claim("DoRA norms a layer and step", "norms", "weft.DoRA", None, 1.0),
        ),
        weight=14,
        least=4,
    ),
    Case(
        "dvora-1024",
        "step",
        SMALL,
        ("weft.VeRA:256", "weft.DVoRA:256"),
        (
            Claim(
                "DVoRA r=256, 1024 tokens / VeRA", "step", "weft.DVoRA:256", "weft.VeRA:256", 1.04
            ),
        ),
        weight=6,
    ),
    Case(
        "vera-1024",
        "step",
        WIDE,
        ("limit", "weft.VeRA:256", "peft.VeRA:256"),
        (_vera(1024, 1.25),),
        weight=5,
    ),
    Case(
        "vera-4096",
        "step",
        replace(WIDE, tokens=4096),
        ("limit", "weft.VeRA:256", "peft.VeRA:256"),
        (_vera(4096, 1.15),),
        weight=10,
        least=4,
    ),
]

_MEMORY = [
    Case(
        "kept-1024",
        "kept",
        SMALL,
        (
            "limit",
            "weft.LoRA",
            "weft.DoRA",
            "weft.VeRA:256",
            "weft.DVoRA:256",
            "weft.LoRAFA",
            "peft.LoRA",
            "peft.DoRA",
            "peft.VeRA:256",
            "peft.LoRAFA",
            "full",
        ),
        (
            Claim(
                "DoRA, bytes kept / LoRA",
                "saved",
                "weft.DoRA",
                "weft.LoRA",
                1.0,
                ("peft.DoRA", "weft.LoRA"),
            ),
            Claim(
                "VeRA r=256, bytes kept / x A'",
                "activations",
                "weft.VeRA:256",
                None,
                1.0,
                ("peft.VeRA:256", None),
            ),
            Claim(
                "LoRA-FA, bytes kept / x A'",
                "activations",
                "weft.LoRAFA",
                None,
                1.0,
                ("peft.LoRAFA", None),
            ),
            Claim(
                "full fine-tuning, bytes kept / LoRA",
                "saved",
                "full",
                "weft.LoRA",
                note="to scale",
                main=False,
            ),
        ),
        weight=7,
    ),
    Case(
        "peak-1024",
        "peak",
        SMALL,
        ("limit", "weft.LoRA", "weft.DoRA", "peft.DoRA", "full"),
        (
            Claim(
                "DoRA, peak of the process / LoRA",
                "process_peak",
                "weft.DoRA",
                "weft.LoRA",
                peer=("peft.DoRA", "weft.LoRA"),
                main=False,
            ),
        ),
        weight=6,
    ),
]


def _token(name: str, text: str, at_most: float | None = 1.02, note: str = "") -> Claim:
    return Claim(
        f"{text}, one token / base", "seconds", name, "base", at_most, note=note, main=False
    )


_USE = [
    Case(
        "mixed-16",
        "mixed",
        SMALL,
        mixed.METHODS,
        (
            Claim(
                "16 rows, 16 adapters / one LoRA",
                "seconds",
                "mixed:16",
                "LoRA",
                1.25,
                headline=True,
            ),
            Claim("the same, 2 to 64 resident: deviation", "deviation", "flat", None, 0.10),
        ),
        weight=6,
        least=7,
    ),
    Case(
        "large",
        "large",
        Setup(r=16),
        ("weft.LoRA", "weft.DoRA", "weft.VeRA:256", "weft.DVoRA:256", "weft.LoRAFA"),
        (
            Claim("attach LoRA r=16, 7B on meta: s", "attach", "weft.LoRA", None, 0.5),
            Claim("attach DVoRA r=256, 7B on meta: s", "attach", "weft.DVoRA:256", None, 0.5),
            Claim("load LoRA r=16, 7B (160 MB): s", "load", "load:16", note="no target"),
            Claim("load: time / bytes, r=32 to r=16", "slope", "growth", None, 1.1),
        ),
        weight=4,
        least=3,
    ),
    Case(
        "token",
        "token",
        SMALL,
        (
            "base",
            *(f"merged.{m}" for m in MERGED),
            *(f"weft.{m}" for m in MERGED),
            "peft.LoRA",
            "peft.DoRA",
            "houlsby:64",
            "lin:64",
        ),
        (
            *(_token(f"merged.{m}", f"merged {m.partition(':')[0]}") for m in MERGED),
            _token("weft.LoRA", "LoRA beside", None),
            _token("weft.DoRA", "DoRA beside", None),
            _token("houlsby:64", "Adapter H", None, "1.2-1.3"),
            _token("lin:64", "Adapter L", None, "1.2-1.3"),
        ),
        weight=5,
        least=21,
    ),
    Case(
        "forward-1024",
        "forward",
        SMALL,
        (
            "base",
            "weft.LoRA",
            "weft.DoRA",
            "weft.VeRA:256",
            "weft.DVoRA:256",
            "peft.LoRA",
            "peft.DoRA",
            "peft.VeRA:256",
        ),
        (
            Claim(
                "DoRA, inference forward / base",
                "seconds",
                "weft.DoRA",
                "base",
                peer=("peft.DoRA", "base"),
                main=False,
            ),
        ),
        weight=6,
    ),
    Case(
        "handling",
        "handling",
        SMALL,
        ("weft.LoRA", "peft.LoRA", "weft.DoRA", "peft.DoRA", "weft.VeRA:256", "peft.VeRA:256"),
        tuple(
            Claim(
                f"{what} LoRA: ms",
                what,
                "weft.LoRA",
                peer=("peft.LoRA", None),
                scale=1e3,
                main=False,
            )
            for what in ("attach", "save", "load", "switch")
        ),
        weight=4,
    ),
    Case(
        "import",
        "import",
        SMALL,
        ("weft", "peft"),
        (
            Claim(
                "import weft after torch: s",
                "beyond",
                "weft",
                None,
                0.1,
                ("peft", None),
                main=False,
            ),
        ),
        weight=4,
    ),
]

QUICK: Sequence[Case] = (*small_work.QUICK, *_STEPS, *_MEMORY, *_USE)

_ALL = (
    "limit",
    "weft.LoRA",
    "weft.DoRA",
    "weft.VeRA",
    "weft.DVoRA",
    "weft.LoRAFA",
    "weft.AdaLoRA",
    "peft.LoRA",
    "peft.DoRA",
    "peft.VeRA",
    "peft.LoRAFA",
    "peft.AdaLoRA",
    "dense.DoRA",
)
_FACTORS: dict[str, Sequence[Any]] = {
    "model": ("llama-1024", "llama-2048", "roberta-base", "gpt2"),
    "tokens": (128, 4096),
    "r": (8, 64, 256),
    "targets": ("q,v",),
    "dtype": ("bfloat16",),
    "accumulate": (8,),
    "checkpointing": (True,),
    "dropout": (0.05,),
    "flow": (False,),
}


def _full() -> list[Case]:
    cases = [Case("base", "step", SMALL, _ALL)]
    for field, values in _FACTORS.items():
        for value in values:
            name = f"{field}={value}".replace("q,v", "qv")
            contenders = tuple(c for c in _ALL if not (field == "dropout" and c == "dense.DoRA"))
            cases.append(Case(name, "step", replace(SMALL, **{field: value}), contenders))
    kept_too = ("roberta-base", "gpt2", "llama-1024")
    return [
        *cases,
        *(Case(f"kept-{model}", "kept", Setup(model=model), _ALL) for model in kept_too),
    ]


FULL: Sequence[Case] = (*QUICK, *small_work.FULL, *_full())
