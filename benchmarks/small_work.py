"""The cases of small work: what an adapter adds to one layer, to a generated token, and to a whole
training run of a small model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .case import Case
from .claims import Claim
from .setup import STORIES, Setup

LORA, DORA, VERA, DVORA = "LoRA:8", "DoRA:8", "VeRA:16", "DVoRA:16"
METHODS = (LORA, VERA, DORA, DVORA)
MODEL = "stories15M" if STORIES == "stories15m" else "15M random"
_PASSES = (("forward", "forward_extra"), ("training", "train_extra"))
# Goals: a method's extra time over that of another contender.
_GOALS = (
    ("forward", LORA, f"peft.{LORA}", "LoRA forward / peft", 0.35),
    ("forward", VERA, f"peft.{VERA}", "VeRA forward / peft", 0.6),
    ("forward", DORA, f"peft.{DORA}", "DoRA forward / peft", 0.2),
    ("forward", DVORA, f"peft.{DORA}", "DVoRA forward / peft's DoRA", 0.2),
    ("training", LORA, f"peft.{LORA}", "LoRA training / peft", 0.65),
    ("training", VERA, f"peft.{VERA}", "VeRA training / peft", 0.9),
    ("training", DORA, f"peft.{DORA}", "DoRA training / peft", 0.5),
    ("training", DVORA, f"weft.{DORA}", "DVoRA training / own DoRA", 1.3),
)


def overhead(
    model: str, tokens: int, goals: bool = False, device: str = "cpu", dtype: str = "float32"
) -> Case:
    """The extra time of every method in one of the stacks "linear-WIDTH"; one thread on a CPU."""
    width = model.partition("-")[2]
    contenders = ["bare"]
    for method in METHODS:
        contenders += [f"weft.{method}", f"floor.{method}"]
        contenders += [f"peft.{method}"] if method != DVORA else []
    metrics = dict(_PASSES)
    ratios = tuple(
        Claim(
            f"extra: {text}",
            metrics[kind],
            f"weft.{method}",
            over,
            goal,
            headline=(kind, method) == ("forward", LORA),
        )
        for kind, method, over, text, goal in (_GOALS if goals else ())
    )
    shown = tuple(
        Claim(
            f"{_name(method)} {kind}, {width} x {tokens}: extra us",
            metric,
            f"weft.{method}",
            peer=None if method == DVORA else (f"peft.{method}", None),
            floor=f"floor.{method}",
            scale=1e6,
            digits=1,
            main=False,
        )
        for kind, metric in _PASSES
        for method in METHODS
    )
    prefix = "" if device == "cpu" else "gpu-"
    name = f"{prefix}overhead-{width}" + ("" if tokens == 8 else f"-{tokens}")
    return Case(
        name,
        "overhead",
        Setup(
            model=model,
            tokens=tokens,
            r=8,
            dtype=dtype,
            flow=False,
            threads=1 if device == "cpu" else 0,
            device=device,
        ),
        tuple(contenders),
        (*ratios, *shown),
        weight=9 if goals else 4,
        least=7 if goals else 5,
    )


def _name(contender: str) -> str:
    return contender.partition(":")[0]


def _generate(over: str, text: str, rows: int, at_most: float | None, peer: str = "") -> Claim:
    return Claim(
        f"{MODEL} x {rows}: {text} / bare",
        f"seconds_{rows}",
        over,
        "base",
        at_most if rows == 1 else None,
        (peer, "base") if peer else None,
        main=rows == 1,
    )


GENERATE = Case(
    "generate",
    "generate",
    Setup(model=STORIES, tokens=128, r=8, flow=False, threads=1),
    (
        "base",
        f"weft.{LORA}",
        f"weft.{DORA}",
        f"merged.{LORA}",
        f"merged.{DORA}",
        f"peft.{LORA}",
        f"peft.{DORA}",
    ),
    tuple(
        claim
        for rows in (1, 8)
        for claim in (
            _generate(f"weft.{LORA}", "LoRA", rows, 1.15, f"peft.{LORA}"),
            _generate(f"weft.{DORA}", "DoRA", rows, 1.2, f"peft.{DORA}"),
            _generate(f"merged.{LORA}", "merged LoRA", rows, 1.01),
            _generate(f"merged.{DORA}", "merged DoRA", rows, 1.01),
            Claim(
                f"{MODEL} x {rows}: LoRA tokens/s",
                f"tokens_{rows}",
                f"weft.{LORA}",
                peer=(f"peft.{LORA}", None),
                digits=0,
                main=False,
            ),
        )
    ),
    weight=12,
    least=7,
)

TRAIN = Case(
    "train",
    "train",
    Setup(model=STORIES, tokens=128, r=8, flow=False, threads=2),
    (f"weft.{LORA}", f"peft.{LORA}", f"weft.{DORA}", f"peft.{DORA}"),
    tuple(
        Claim(
            f"weft train {MODEL}, {_name(m)} / peft",
            "process",
            f"weft.{m}",
            f"peft.{m}",
            goal,
            headline=m == LORA,
        )
        for m, goal in ((LORA, 0.95), (DORA, 0.85))
    ),
    weight=45,
    least=3,
)

NARROW = Case(
    "narrow-128",
    "step",
    replace(Setup(), model="llama-704", tokens=128),
    (
        "limit",
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
            "LoRA, 704 wide, 128 tokens / limit",
            "step",
            "weft.LoRA",
            "limit",
            1.10,
            ("peft.LoRA", "limit"),
        ),
        Claim(
            "VeRA, 704 wide, 128 tokens / limit",
            "step",
            "weft.VeRA:256",
            "limit",
            1.40,
            ("peft.VeRA:256", "limit"),
        ),
        Claim(
            "DoRA, 704 wide, 128 tokens / LoRA",
            "step",
            "weft.DoRA",
            "weft.LoRA",
            1.10,
            ("peft.DoRA", "weft.LoRA"),
        ),
        Claim(
            "DVoRA, 704 wide, 128 tokens / VeRA", "step", "weft.DVoRA:256", "weft.VeRA:256", 1.10
        ),
    ),
    weight=7,
)

QUICK: Sequence[Case] = (
    overhead("linear-64", 8, goals=True),
    overhead("linear-64", 1),
    overhead("linear-1024", 8),
    GENERATE,
    TRAIN,
    NARROW,
)
FULL: Sequence[Case] = (
    overhead("linear-64", 128),
    overhead("linear-1024", 1),
    overhead("linear-1024", 128),
)
