"""Adapters under ZeroRedundancyOptimizer, whose processes each step a part of the tensors: two real
processes over gloo.
"""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import weft
from support import config, inputs, net

STEPS = 8
METHODS = {
    "AdaLoRA": {"total_steps": 10, "interval": 1, "warm_up": 1, "final": 1},
    "DyLoRA": {"r_min": 1, "last_only": True},
    "LoRAFA": {"precondition": True},
}


def run(method, parallel, rank=0, world=1):
    """Everything that training has made of the adapter."""
    model = net()
    adapter = weft.attach(model, config(method, **METHODS[method]))
    if parallel:
        from torch.distributed.optim import (
            ZeroRedundancyOptimizer,
        )  # its import warns of torch's own calls

        called = nn.parallel.DistributedDataParallel(model)
        optimiser = ZeroRedundancyOptimizer(adapter.parameters(), torch.optim.AdamW, lr=0.05)
    else:
        called, optimiser = model, torch.optim.AdamW(adapter.parameters(), lr=0.05)
    for step in range(STEPS):
        optimiser.zero_grad()
        called(inputs("linear", seed=step).chunk(world)[rank]).sub(1).pow(2).mean().backward()
        optimiser.step()
    return {
        **{name: p.detach().clone() for name, p in adapter.named_parameters()},
        **adapter.training_state(),
    }


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save({method: run(method, True, rank, 2) for method in METHODS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_run(tmp_path):
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for method in METHODS:
        alone = run(method, False)
        for found in both:
            assert found[method].keys() == alone.keys()
            for name, wanted in alone.items():
                assert torch.allclose(
                    found[method][name].double(), wanted.double(), rtol=1e-3, atol=1e-5
                ), (method, name)
    assert (
        sum(int(kept.sum()) for name, kept in both[0]["AdaLoRA"].items() if name.endswith("kept"))
        == 4
    )
    assert int(both[0]["AdaLoRA"]["mid.step"]) == STEPS == int(both[0]["DyLoRA"]["mid.step"])
