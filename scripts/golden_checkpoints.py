"""Write tests/golden/checkpoints: one small adapter of every method as the Weft of this checkout saves
it, and what each computes.

    python scripts/golden_checkpoints.py [NAME ...]

The files are proof that checkpoints of earlier versions load, so those that exist are not written
again. A method that is new since the last release gets its file at the next one: add a case to CASES and
run this script. The bases are those of tests/checkpoint/golden_bases.py. The outputs are in
expected.safetensors, one tensor per adapter, beside the output of the bases; methods.txt lists the
methods that have a file.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "checkpoint"), str(ROOT / "tests")]

from golden_bases import INPUT, KINDS, base, fill, logits  # noqa: E402

import weft  # noqa: E402

FOLDER = ROOT / "tests" / "golden" / "checkpoints"
EXPECTED = FOLDER / "expected.safetensors"
METHODS = FOLDER / "methods.txt"
TWO = ["q_proj", "down_proj"]
# name: (base, configuration, keywords of weft.save)
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "lora": ("llama", weft.LoRA(r=2, alpha=3, targets={"q_proj": {}, "up_proj": {"r": 3}}), {}),
    "lora_gpt2": (
        "gpt2",
        weft.LoRA(r=2, rslora=True, targets=["c_attn", "wte"], modules_to_save=["score"]),
        {},
    ),
    "dora": ("llama", weft.DoRA(r=2, alpha=3, targets=TWO), {}),
    "dora_gpt2": ("gpt2", weft.DoRA(r=2, targets=["c_fc"], modules_to_save=["score"]), {}),
    "vera": ("llama", weft.VeRA(r=6, targets=TWO, seed=5), {}),
    "vera_projections": ("llama", weft.VeRA(r=6, targets=TWO), {"projections": True}),
    "dvora": ("llama", weft.DVoRA(r=6, targets=TWO), {}),
    "lora_fa": ("llama", weft.LoRAFA(r=2, targets=TWO, seed=3), {}),
    "adalora": (
        "llama",
        weft.AdaLoRA(r=3, target_r=2, total_steps=4, warm_up=1, final=1, interval=1, targets=TWO),
        {},
    ),
    "adalora_native": (
        "llama",
        weft.AdaLoRA(r=3, total_steps=4, targets={"q_proj": {}, "down_proj": {"r": 2}}),
        {},
    ),
    "dylora": ("llama", weft.DyLoRA(r=3, targets=TWO), {}),
    "bitfit": ("llama", weft.BitFit(), {}),
    "bitfit_gpt2": ("gpt2", weft.BitFit(modules_to_save=["score"]), {}),
    "head": ("gpt2", weft.Head(), {}),
    "toplayers": ("gpt2", weft.TopLayers(k=1), {}),
    "bottleneck": ("llama", weft.Bottleneck(preset="houlsby", r=3), {}),
    "prefix": ("llama", weft.Prefix(n=3), {}),
    "prefix_native": ("llama", weft.Prefix(n=3, positions="kept"), {}),
    "preembed": ("llama", weft.PreEmbed(l_p=3), {}),
    "preembed_native": ("llama", weft.PreEmbed(l_p=2, l_i=1), {}),
    "prelayer": ("llama", weft.PreLayer(l_p=2, l_i=1), {}),
}


def move(model: Any, adapter: Any) -> None:
    """Take every number off its start; AdaLoRA trains, so that it has pruned triplets."""
    if isinstance(adapter.config, weft.AdaLoRA) and adapter.config.target_r != 8:
        optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.05)
        for _ in range(4):
            optimiser.zero_grad()
            model(INPUT).logits.square().mean().backward()
            optimiser.step()
        return
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            change = torch.empty_like(p)
            fill(change, name, 0.3)
            p.add_(change)


def main(names: list[str]) -> None:
    """Write the adapters named, or all that are missing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    expected = load_file(EXPECTED) if EXPECTED.is_file() else {}
    for kind in KINDS:
        expected.setdefault(f"base.{kind}", logits(base(kind)))
    for name in names or list(CASES):
        if (FOLDER / name).exists():
            continue
        kind, config, how = CASES[name]
        model = base(kind)
        adapter = weft.attach(model, config)
        move(model, adapter)
        weft.save(model, FOLDER / name, **how)
        expected[name] = logits(model)
        print(name, sum(f.stat().st_size for f in (FOLDER / name).iterdir()), "bytes")
    temporary = FOLDER / ".expected.tmp"
    save_file({key: t.contiguous() for key, t in expected.items()}, str(temporary))
    temporary.chmod(0o644)
    shutil.move(temporary, EXPECTED)
    folders = [path for path in FOLDER.iterdir() if path.is_dir()]
    written = sorted({weft.inspect(folder).method for folder in folders})
    METHODS.write_text("\n".join([*written, ""]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
