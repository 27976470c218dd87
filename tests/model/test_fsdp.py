"""DoRA under FSDP2 (fully_shard), which gives a layer other tensors than it was built with: two
real processes over gloo.
"""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import weft
from support import config, inputs, net, reference_paths

STEPS = 5
METHODS = ("LoRA", "DoRA", "VeRA", "DVoRA")


def run(method, parallel, rank=0, world=1):
    model = net()
    weft.attach(model, config(method))
    if parallel:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in (model.layer, model.mid):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    outputs = []
    for step in range(STEPS):
        optimiser.zero_grad()
        out = model(inputs("linear", seed=step).chunk(world)[rank])
        outputs.append(out.detach().clone())
        out.sub(1).pow(2).mean().backward()
        optimiser.step()
    return outputs


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save({method: run(method, True, rank, 2) for method in METHODS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_shards_of_two_processes_are_one_run(tmp_path, monkeypatch):
    """The run beside it takes the plain definitions, so that a stale norm shows in the second
    step's output.
    """
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    reference_paths(monkeypatch, "1")
    for method in METHODS:
        alone = run(method, False)
        for step, wanted in enumerate(alone):
            found = torch.cat([one[method][step] for one in both])
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5), (method, step)
