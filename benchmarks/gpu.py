"""The cases of one GPU, within 20 minutes: the kernels beside float64, the extra time of a layer,
and a training step of a 7B-shaped model in bfloat16. `--tiny` runs the same on small shapes.
"""

from __future__ import annotations

import torch

from .case import Case
from .claims import Claim
from .kinds import kernels
from .setup import DEPTHS, Setup
from .small_work import overhead

GB = 1e9
# One layer of Llama-7B's shape, for the choice of how many fit.
_BASE = 0.405 * GB  # its weights in bfloat16
_STEP = 0.9 * GB  # kept for backward at 1,024 tokens
_DENSE = 1.3 * GB  # more if B A is built: W + B A in float32 and W' in bfloat16 are kept
_RANKED = 78_080 * 16  # bytes per rank: A and B, their gradients and AdamW's two moments
_FIXED = 4 * GB  # embedding, head, logits
RANKS = (16, 64, 384)
AT_MOST = {16: 1.05, 64: 1.05, 384: None}


def cases(device: str = "cuda", tiny: bool = False) -> list[Case]:
    """Returns the cases. Raises ValueError if `device` is "cuda" and torch sees no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "torch sees no CUDA device here; `--device cpu --tiny` tries the script without one."
        )
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    shapes = (("linear-tiny", 8, "float32"),) if tiny else _SHAPES
    return [
        _kernels(device, tiny),
        *(overhead(model, tokens, device=device, dtype=dtype) for model, tokens, dtype in shapes),
        *(_ranked(r, _setup(device, tiny, free, r)) for r in ((4,) if tiny else RANKS)),
        _vectors(8 if tiny else 256, _setup(device, tiny, free, 0)),
    ]


_SHAPES = (
    ("linear-64", 8, "float32"),
    ("linear-1024", 8, "float32"),
    ("linear-1024", 128, "bfloat16"),
    ("linear-4096", 1, "bfloat16"),
    ("linear-4096", 128, "bfloat16"),
)


def _kernels(device: str, tiny: bool) -> Case:
    name = "compose_grad" if tiny else kernels.ALL
    claim = Claim("kernels unlike float64: checks", "failed", name, None, 0.0, digits=0)
    return Case("gpu-kernels", "kernels", Setup(device=device), (name,), (claim,), weight=3)


def layers_that_fit(free: float, r: int, contenders: int = 5) -> int:
    """Returns how many of the 32 layers fit into `free` bytes with the adapters of rank r."""
    per_layer = _BASE + contenders * r * _RANKED + _STEP + (_DENSE if r else 0)
    fitting = [n for n in DEPTHS if _FIXED + n * per_layer <= 0.9 * free]
    return max(fitting, default=DEPTHS[-1])


def _setup(device: str, tiny: bool, free: float, r: int) -> Setup:
    model = "llama-7b-tiny/4" if tiny else f"llama-7b/{layers_that_fit(free, r)}"
    return Setup(
        model=model, tokens=16 if tiny else 1024, r=r or 16, dtype="bfloat16", device=device
    )


def _ranked(r: int, setup: Setup) -> Case:
    """LoRA and DoRA of one rank, beside peft and DoRA with B A built."""
    lora, dora = f"weft.LoRA:{r}", f"weft.DoRA:{r}"
    claims = (
        Claim(
            f"7B, DoRA r={r} / LoRA",
            "step_32",
            dora,
            lora,
            AT_MOST.get(r),
            (f"peft.DoRA:{r}", lora),
        ),
        Claim(
            f"7B, LoRA r={r} / limit",
            "step_32",
            lora,
            "limit",
            peer=(f"peft.LoRA:{r}", "limit"),
            main=False,
        ),
        Claim(f"7B, dense DoRA r={r} / LoRA", "step_32", f"dense.DoRA:{r}", lora, main=False),
    )
    names = ("limit", lora, dora, f"peft.LoRA:{r}", f"peft.DoRA:{r}", f"dense.DoRA:{r}")
    return Case(f"gpu-7b-r{r}", "deep", setup, names, claims, weight=6, least=7)


def _vectors(r: int, setup: Setup) -> Case:
    """VeRA and DVoRA, beside peft."""
    vera, dvora = f"weft.VeRA:{r}", f"weft.DVoRA:{r}"
    claims = (
        Claim(
            f"7B, VeRA r={r} / limit",
            "step_32",
            vera,
            "limit",
            peer=(f"peft.VeRA:{r}", "limit"),
            main=False,
        ),
        Claim(f"7B, DVoRA r={r} / VeRA", "step_32", dvora, vera, main=False),
    )
    names = ("limit", vera, dvora, f"peft.VeRA:{r}")
    return Case("gpu-7b-vera", "deep", setup, names, claims, weight=5, least=7)
