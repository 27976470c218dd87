"""One layer of 64 fused experts: a training step and what it keeps, over the frozen layer itself.

`python -m benchmarks.experts [ROUNDS]` prints a table, in CPU time of one thread. A step is forward,
backward to the layer's input and an optimiser step; the contenders take turns, and the ratio is that of
each turn, in another order each time. Kept for backward: the storages that autograd saves,
without parameters, the layer's input and the router's choice; in per cent of the experts' weights.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

import weft

from .machine import machine

EXPERTS, WIDTH, INNER, TOKENS, CHOSEN = 64, 512, 256, 512, 8
CONTENDERS: dict[str, Any] = {
    "LoRA": weft.LoRA(r=8, targets="experts"),
    "LoRA-FA": weft.LoRAFA(r=8, targets="experts"),
    "VeRA": weft.VeRA(r=32, targets="experts"),
    "DoRA": weft.DoRA(r=8, targets="experts"),
    "DVoRA": weft.DVoRA(r=32, targets="experts"),
}


class Layer(nn.Module):
    """A mixture of experts of OLMoE, a quarter as wide, behind a choice that is given."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

        config = OlmoeConfig(
            hidden_size=WIDTH, intermediate_size=INNER, num_experts=EXPERTS, hidden_act="silu"
        )
        config._experts_implementation = "grouped_mm"
        self.experts = OlmoeExperts(config)
        for p in self.experts.parameters():
            nn.init.normal_(p, std=0.02).requires_grad_(False)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        found: Tensor = self.experts(hidden, index, weights)
        return found


@dataclass
class Given:
    """The inputs of a step."""

    hidden: Tensor
    index: Tensor
    weights: Tensor

    @classmethod
    def make(cls) -> Given:
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(TOKENS, WIDTH, generator=g).requires_grad_()
        scores = torch.randn(TOKENS, EXPERTS, generator=g).softmax(-1)
        weights, index = scores.topk(CHOSEN)
        return cls(hidden, index, weights.requires_grad_())


def contenders(base: Layer) -> dict[str, nn.Module]:
    """The layer, bare and with every adapter."""
    found: dict[str, nn.Module] = {"base": base}
    for name, config in CONTENDERS.items():
        found[name] = copy.deepcopy(base)
        weft.attach(found[name], config)
    found["peft LoRA"] = _of_peft(copy.deepcopy(base))
    return {name: model.train() for name, model in found.items()}


def _of_peft(layer: Layer) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=8, lora_alpha=8, target_modules=[], target_parameters=names)
    found: nn.Module = inject_adapter_in_model(config, layer)
    return found


def stepper(model: nn.Module, given: Given) -> Callable[[], None]:
    """A training step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3) if trained else None

    def step() -> None:
        given.hidden.grad = given.weights.grad = None
        model(given.hidden, given.index, given.weights).square().mean().backward()
        if optimiser is not None:
            optimiser.step()
            optimiser.zero_grad()

    return step


@contextmanager
def saved(known: set[int]) -> Iterator[dict[int, int]]:
    """Within this block, the bytes of every storage that autograd saves, by address."""
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


def kept(model: nn.Module, given: Given) -> int:
    """The bytes that one forward keeps for backward."""
    own = [*model.parameters(), *model.buffers(), given.hidden, given.index, given.weights]
    known = {t.untyped_storage().data_ptr() for t in own}
    with saved(known) as found:
        y = model(given.hidden, given.index, given.weights)
        total = sum(found.values())
    del y
    return total


def main(words: list[str]) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    given, base = Given.make(), Layer()
    size = sum(p.numel() * p.element_size() for p in base.parameters())
    models = contenders(base)
    steps = {name: stepper(model, given) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(int(words[0] if words else 30) + 2):
        order = list(steps)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            started = time.process_time()
            steps[name]()
            if turn > 1:
                times[name].append(time.process_time() - started)
    print(
        f"{EXPERTS} experts, {WIDTH} -> 2 x {INNER} -> {WIDTH}, {size / 2**20:.0f} MiB; {TOKENS} tokens, "
        f"{CHOSEN} experts each; float32, 1 thread, CPU time, {machine()['cpu']}, "
        f"torch {torch.__version__}"
    )
    print(
        f"{'':12}{'ms':>8}{'quartiles':>18}{'over base':>11}{'quartiles':>14}{'kept MiB':>10}{'beyond base':>13}"
    )
    bare_kept = kept(base, given)
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found, times["base"], strict=True)]
        low, _, high = quantiles(found, n=4)
        first, _, third = quantiles(ratios, n=4)
        own = kept(models[name], given)
        print(
            f"{name:12}{1e3 * median(found):8.1f}{1e3 * low:9.1f} -{1e3 * high:7.1f}{median(ratios):11.3f}"
            f"{first:7.3f} -{third:5.3f}{own / 2**20:10.1f}{100 * (own - bare_kept) / size:11.1f} %"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
