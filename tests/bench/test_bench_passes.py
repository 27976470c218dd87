"""The single operations of a layer are those that a fused layer runs."""

import torch

from benchmarks import passes


def test_the_table_names_every_operation_and_its_share_of_the_layers_own_products(
    capsys, monkeypatch
):
    monkeypatch.setattr(passes, "ROUNDS", 2)
    passes.main(["6", "5", "4", "3"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("6 tokens, W [5, 4], r = 3")
    assert len(lines) == len(passes.passes(6, 5, 4, 3)) and all(
        line.endswith("%") for line in lines
    )
    shares = [float(line.split()[-2]) for line in lines[:2]]
    assert abs(sum(shares) - 100) < 0.2


def test_the_operations_have_the_shapes_of_a_layer():
    works = passes.passes(6, 5, 4, 3)
    shapes = {name: tuple(torch.as_tensor(work(0)).shape) for name, work in works.items()}
    assert shapes["x W'"] == shapes["LoRA: y += h B'"] == (6, 5)
    assert shapes["g W"] == shapes["LoRA: grad x += (g B) A"] == (6, 4)
    assert (
        shapes["DoRA: W A'"] == (5, 3)
        and shapes["DoRA: sum of g y"] == (5,)
        and shapes["W' = W + C A"] == (5, 4)
    )
