"""DyLoRA draws a rank a step, trains it alone, and every smaller rank is an adapter of its own."""

import copy

import pytest
import torch

import oracle
import weft
from support import check_close, config, inputs, move, net, same_bits

R = 6


def fresh(kind="linear", **changes):
    model = net(kind)
    adapter = weft.attach(
        model,
        weft.DyLoRA(
            **{"r": R, "r_min": 2, "alpha": 5.0, "seed": 7, "targets": ["layer", "mid"], **changes}
        ),
    )
    return model, adapter, inputs(kind)


def rank(adapter):
    found = {int(site.b) for site in adapter.sites.values()}
    assert len(found) == 1
    return found.pop()


def step(model, x, optimiser):
    optimiser.zero_grad()
    model(x).sub(1).pow(2).mean().backward()
    optimiser.step()


def test_every_rank_of_the_range_comes_about_equally_often():
    rule = weft.DyLoRA(r=R, r_min=2, seed=3)
    drawn = [rule.rank_at(t) for t in range(1000)]
    assert all(150 < drawn.count(b) < 250 for b in range(2, R + 1)) and len(set(drawn)) == R - 1
    assert drawn != [weft.DyLoRA(r=R, r_min=2, seed=4).rank_at(t) for t in range(1000)]
    assert drawn[:5] == [weft.DyLoRA(r=R, r_min=2, seed=3).rank_at(t) for t in range(5)]


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_training_computes_the_rank_of_the_step_and_evaluation_the_whole(kind):
    model, adapter, x = fresh(kind)
    move(adapter)
    model.train()
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.01)
    seen = set()
    for t in range(12):
        b = rank(adapter)
        assert b == adapter.config.rank_at(t) and adapter.steps == t
        seen.add(b)
        layer, site = model.layer, adapter.sites["layer"]
        W = site.base.weight().double()
        tensors = {k: p.detach().double() for k, p in site.trainable().items()}
        y = torch.eye(7, dtype=torch.float64)[x] if kind == "embedding" else x.double()
        bias = 0 if kind == "embedding" else layer.bias.double()
        check_close(
            layer(x), y @ oracle.dylora(W, tensors, adapter.config, b).t() + bias, torch.float32
        )
        layer.eval()
        check_close(
            layer(x), y @ oracle.dylora(W, tensors, adapter.config).t() + bias, torch.float32
        )
        layer.train()
        step(model, x, optimiser)
    assert seen == set(range(2, R + 1))


def test_without_alpha_every_rank_has_the_scale_one_in_training_too():
    model, adapter, x = fresh(alpha=None)
    move(adapter)
    b, site, y = rank(adapter), adapter.sites["layer"], x.double()
    W = model.layer.weight.double() + site.B.double()[:, :b] @ site.A.double()[:b]
    check_close(model.layer(x), y @ W.t() + model.layer.bias.double(), torch.float32)


def test_layers_with_ranks_of_their_own_draw_from_their_own_range():
    model, adapter, x = fresh(targets={"layer": {"r": 3}, "mid": {"r_min": 4}})
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for t in range(8):
        for site, (low, high) in zip(adapter.sites.values(), ((2, 3), (4, R)), strict=True):
            assert int(site.b) == site.method.rank_at(t) and low <= int(site.b) <= high
        step(model, x, optimiser)


def test_the_range_shrinks_with_the_rank_and_the_start_is_lora_s():
    rule = weft.DyLoRA(r=R, r_min=4)
    assert [(s.r, s.r_min) for s in map(rule.truncated, (9, 5, 3))] == [(R, 4), (5, 4), (3, 3)]
    for init in ("gaussian", "kaiming"):
        sites = [
            weft.attach(net(), method(r=R, init=init, targets=["layer"])).sites["layer"]
            for method in (weft.DyLoRA, weft.LoRA)
        ]
        assert same_bits(sites[0].A, sites[1].A)


def test_only_the_first_b_have_gradients_and_accumulation_sees_one_b():
    model, adapter, x = fresh()
    move(adapter)
    b = rank(adapter)
    for _ in range(3):
        model(x).sum().backward()
        assert rank(adapter) == b < R
    for site in adapter.sites.values():
        assert site.A.grad[:b].abs().min() > 0 and not site.A.grad[b:].any()
        assert site.B.grad[:, :b].abs().min() > 0 and not site.B.grad[:, b:].any()


def test_last_only_moves_the_b_th_alone_whatever_the_optimiser():
    model, adapter, x = fresh(last_only=True)
    move(adapter)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(8):
        b, before = rank(adapter), {m: (s.A.clone(), s.B.clone()) for m, s in adapter.sites.items()}
        step(model, x, optimiser)
        for module, site in adapter.sites.items():
            A, B = before[module]
            moved = (site.A != A).any(1), (site.B != B).any(0)
            assert all(m.nonzero().flatten().tolist() == [b - 1] for m in moved)
            assert (
                site.A.grad.any(1).nonzero().tolist()
                == site.B.grad.any(0).nonzero().tolist()
                == [[b - 1]]
            )
    assert adapter.config.audit_after == R - 2 + 3


def test_last_only_with_a_frozen_factor_and_after_a_step_that_raised():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            if fails:
                raise MemoryError
            return super().step(closure)

    model, adapter, x = fresh(last_only=True)
    move(adapter)
    for site in adapter.sites.values():
        site.A.requires_grad_(False)
    optimiser, fails = Failing([p for p in adapter.parameters() if p.requires_grad], lr=0.1), True
    with pytest.raises(MemoryError):
        step(model, x, optimiser)
    move(adapter, seed=5)  # as a state that is loaded again would
    fails, before = False, adapter.sites["mid"].B.detach().clone()
    b = rank(adapter)
    step(model, x, optimiser)
    assert (before != adapter.sites["mid"].B).any(0).nonzero().flatten().tolist() == [b - 1]


def test_last_only_holds_through_an_optimiser_that_evaluates_often():
    model, adapter, x = fresh(last_only=True)
    move(adapter)
    optimiser = torch.optim.LBFGS(adapter.parameters(), lr=0.5, max_iter=4)

    def closure():
        optimiser.zero_grad()
        loss = model(x).sub(1).pow(2).mean()
        loss.backward()
        return loss

    for _ in range(4):
        b, before = rank(adapter), {m: (s.A.clone(), s.B.clone()) for m, s in adapter.sites.items()}
        optimiser.step(closure)
        for module, site in adapter.sites.items():
            A, B = before[module]
            moved = (site.A != A).any(1), (site.B != B).any(0)
            assert all(m.nonzero().flatten().tolist() == [b - 1] for m in moved)
            assert "held" not in site.__dict__


def test_a_resumed_run_and_a_copy_draw_the_same_ranks_bit_for_bit():
    model, adapter, x = fresh()
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    for _ in range(4):
        step(model, x, optimiser)
    other, again, _ = fresh()
    with torch.no_grad():
        for p, q in zip(again.parameters(), adapter.parameters(), strict=True):
            p.copy_(q)
    again.load_training_state(adapter.training_state())
    second = torch.optim.AdamW(again.parameters(), lr=0.05)
    second.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for _ in range(4):
        step(model, x, optimiser)
        step(other, x, second)
        assert rank(adapter) == rank(again) and adapter.steps == again.steps
        assert all(
            same_bits(p, q) for p, q in zip(adapter.parameters(), again.parameters(), strict=True)
        )


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("alpha", [5.0, None])
def test_every_smaller_rank_is_the_lora_of_the_first_rows(kind, alpha, tmp_path):
    model, adapter, x = fresh(kind, alpha=alpha)
    move(adapter)
    full = {m: (s.A.detach().clone(), s.B.detach().clone()) for m, s in adapter.sites.items()}
    weft.save(model, tmp_path / "full")
    for b in range(R, 0, -1):
        small = net(kind).eval()
        loaded = weft.load(small, tmp_path / "full")
        loaded.truncate(b)
        wanted = net(kind).eval()
        lora = weft.attach(wanted, weft.LoRA(r=b, alpha=alpha, targets=["layer", "mid"]))
        with torch.no_grad():
            for module, site in lora.sites.items():
                site.A.copy_(full[module][0][:b])
                site.B.copy_(full[module][1][:, :b])
        assert same_bits(small(x), wanted(x))
        assert loaded.num_parameters == lora.num_parameters and set(loaded.ranks.values()) == {b}
        weft.save(small, tmp_path / str(b))
        again = net(kind).eval()
        weft.load(again, tmp_path / str(b))
        assert same_bits(again(x), small(x))
        weft.export(tmp_path / str(b), "lora", tmp_path / f"lora{b}")
        exported = net(kind).eval()
        weft.load(exported, tmp_path / f"lora{b}")
        assert same_bits(exported(x), small(x))
        weft.merge(small, verify=x)


def test_a_truncated_adapter_trains_on_with_a_new_optimiser():
    model, adapter, x = fresh()
    step(model, x, torch.optim.SGD(adapter.parameters(), lr=0.1))
    adapter.truncate(3)
    for t in range(1, 6):
        assert adapter.steps == t and rank(adapter) <= 3
        if t == 1:
            optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
        step(model, x, optimiser)


def test_layers_of_larger_rank_are_truncated_too():
    _, adapter, _ = fresh(targets={"layer": {"r": 9}, "mid": {}})
    adapter.truncate(8)
    assert adapter.ranks == {"layer": 8, "mid": R}


@pytest.mark.parametrize("r", [0, 7, True, 2.0])
def test_a_rank_that_is_not_there_is_refused(r):
    _, adapter, _ = fresh()
    with pytest.raises(weft.ConfigError, match="has the ranks 1 to 6"):
        adapter.truncate(r)


def test_other_methods_and_merged_adapters_are_not_truncated():
    model = net()
    with pytest.raises(weft.UnsupportedError, match="ranks of LoRA are not trained to be nested"):
        weft.attach(model, config("LoRA"), name="b").truncate(2)
    adapter = weft.attach(model, config("DyLoRA"))
    weft.merge(model)
    with pytest.raises(weft.MergeError, match="merged"):
        adapter.truncate(2)


def test_one_compilation_serves_every_rank():
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    model, adapter, x = fresh()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(8):
        step(compiled, x, optimiser)
        check_close(compiled(x), model(x), torch.float32)
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_the_audit_passes_where_only_the_last_rank_moves():
    from weft.auditing.audit import AUDIT_AFTER

    assert weft.DyLoRA(r=8).audit_after < AUDIT_AFTER < weft.DyLoRA(r=8, last_only=True).audit_after


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"r": 4, "r_min": 5}, r"DyLoRA\(r=4, r_min=5\): r_min must be a whole number from 1 to r"),
        ({"r_min": 0}, "from 1 to r"),
        ({"r_min": 1.0}, "r_min must be a whole number"),
        ({"last_only": 1}, "True or False"),
    ],
)
def test_what_cannot_be_meant(fields, says):
    with pytest.raises(weft.ConfigError, match=says):
        weft.DyLoRA(**fields)
