"""Handling an adapter: attach, save, load and switch, beside peft; and all of it for a 7B-shaped
model.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

import weft

from ..contenders import attach_awake, config, split
from ..peers import load_peft, save_for_peft
from ..setup import Setup, build, llama, twin
from ..timing import Rounds, Work, interleave

RANKS = (4, 16, 32)  # of the adapters loaded into the 7B-shaped model


def measure(setup: Setup, contenders: tuple[str, ...], rounds: Rounds) -> dict[str, Any]:
    """Metrics: attach, save, load, switch; seconds. "weft.METHOD" or "peft.METHOD"."""
    base = build(setup)
    with tempfile.TemporaryDirectory() as folder:
        works = {
            name: _work(name, base, setup, Path(folder) / name.replace(":", "-"))
            for name in contenders
        }
        return {"samples": interleave(works, rounds)}


def _work(name: str, base: nn.Module, setup: Setup, folder: Path) -> Work:
    side, method, setup = split(name, setup)
    if side not in ("weft", "peft"):
        raise ValueError(f"{name!r} cannot be attached; write weft.METHOD or peft.METHOD.")
    return (
        _weft(method, base, setup, folder) if side == "weft" else _peft(method, base, setup, folder)
    )


def _weft(method: str, base: nn.Module, setup: Setup, folder: Path) -> Work:
    model, made = twin(base), config(method, setup)
    source = twin(base)
    attach_awake(method, source, setup)

    def run() -> Mapping[str, float]:
        times = {
            "attach": _time(lambda: weft.attach(model, made, name="a")),
            "save": _time(lambda: weft.save(source, folder)),
            "load": _time(lambda: weft.load(model, folder, name="b")),
            "switch": _time(lambda: weft.use(model, "a")),
        }
        weft.detach(model, "a")
        weft.detach(model, "b")
        return times

    return run


def _peft(method: str, base: nn.Module, setup: Setup, folder: Path) -> Work:
    from peft import PeftConfig, get_peft_model

    folder.mkdir()
    directory = save_for_peft(method, base, setup, folder)
    source, made = load_peft(base, directory), PeftConfig.from_pretrained(str(directory))
    made.inference_mode = False

    def run() -> Mapping[str, float]:
        found: list[Any] = []
        fresh = twin(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            times = {
                "attach": _time(
                    lambda: found.append(get_peft_model(fresh, made, adapter_name="a"))
                ),
                "save": _time(lambda: source.save_pretrained(str(folder / "again"))),
                "load": _time(lambda: found[0].load_adapter(str(directory), adapter_name="b")),
            }
            times["switch"] = _time(lambda: found[0].set_adapter("b"))
        return times

    return run


def _time(work: Callable[[], object]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


def measure_large(
    setup: Setup,
    contenders: tuple[str, ...],
    rounds: Rounds,
    large: Callable[[], nn.Module] | None = None,
) -> dict[str, Any]:
    """ "weft.METHOD": metric attach, seconds on a model of Llama-7B's shape on the meta device (224
     layers).

    "load:r": LoRA of rank r saved and loaded again, into the same shape on the CPU with weights
    that take no memory (one number, expanded): metrics load (seconds), bytes, per_byte (seconds a
    gigabyte). "growth" has the metric slope: how many times as long the largest took as the middle
    one, over how many times as large it is.
    """
    large = large or (lambda: llama(4096, 32, 11008, 32000))
    with torch.device("meta"):
        model = large()
    works = {name: _attaching(name, model, setup) for name in contenders}
    thin = thinned(model)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {}
        for r in RANKS:
            path = Path(folder) / str(r)
            attach_awake("LoRA", thin, replace(setup, r=r))
            weft.save(thin, path)
            weft.detach(thin)
            works[f"load:{r}"] = _loading(thin, path)
            sizes[r] = (path / "adapter_model.safetensors").stat().st_size
        samples: dict[str, Any] = interleave(works, rounds)
    for r in RANKS:
        found = samples[f"load:{r}"]
        found["bytes"] = [float(sizes[r])]
        found["per_byte"] = [seconds / (sizes[r] / 1e9) for seconds in found["load"]]
    _, middle, most = RANKS
    pairs = zip(samples[f"load:{most}"]["load"], samples[f"load:{middle}"]["load"], strict=True)
    samples["growth"] = {"slope": [a / b / (sizes[most] / sizes[middle]) for a, b in pairs]}
    return {"samples": samples}


def thinned(model: nn.Module) -> nn.Module:
    """A model on the meta device given weights on the CPU, each one number expanded to the whole
    shape.
    """
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(
                    torch.full((), 0.02).expand(p.shape), requires_grad=False
                )
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.zeros((), dtype=b.dtype).expand(b.shape)
    return model


def _attaching(name: str, model: nn.Module, setup: Setup) -> Work:
    side, method, setup = split(name, setup)
    if side != "weft":
        raise ValueError(f"{name!r}: only Weft's own methods are attached to the large model.")
    made = config(method, setup)
    own = copy.deepcopy(model)  # on the meta device, so a copy takes no memory

    def run() -> Mapping[str, float]:
        seconds = _time(lambda: weft.attach(own, made))
        weft.detach(own)
        return {"attach": seconds}

    return run


def _loading(model: nn.Module, path: Path) -> Work:
    def run() -> Mapping[str, float]:
        seconds = _time(lambda: weft.load(model, path))
        weft.detach(model)
        return {"load": seconds}

    return run
