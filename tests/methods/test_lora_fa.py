"""LoRA-FA keeps r numbers a token and no input, finds its frozen A again, and preconditions as
peft's optimiser does.
"""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import weft
from support import awake, check_close, config, inputs, move, net, same_bits
from weft.methods.rng import Rng
from weft.ops import projection as frozen

TOKENS, R = 4 * 6, 3
GOLDEN = [0.9092832, 0.1373487, -0.4899532]


def kept(model, x):
    """Bytes of every tensor that autograd keeps for backward, parameters and buffers apart; and
    their shapes.
    """
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    del out
    return sum(t.untyped_storage().nbytes() for t in found.values()), [
        tuple(t.shape) for t in found.values()
    ]


@pytest.mark.parametrize("method", ["LoRAFA", "LoRA"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_input_is_not_kept(kind, dropout, method):
    """One adapted layer whose input needs a gradient: h = dropout(x) Aᵀ is kept, and two random
    words. LoRA keeps x.
    """
    model = net(kind)
    move(weft.attach(model, config(method, dropout=dropout, targets=["layer"])))
    model.train()
    size, shapes = kept(model.layer, inputs(kind).requires_grad_())
    if method == "LoRA":
        assert size >= 4 * TOKENS * (R + 7)
        return
    assert size == 4 * TOKENS * R + (8 if dropout else 0), shapes
    assert [s for s in shapes if s != (2,)] in ([(4, 6, R)], [(TOKENS, R)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_is_not_kept_under_autocast_or_in_bfloat16(dtype):
    model = net(dtype=dtype)
    move(weft.attach(model, config("LoRAFA", dropout=0.4, targets=["layer"])))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        # The cast copies of frozen matrices are kept too, but nothing of the size of the input (24
        # x 7).
        _, shapes = kept(model.layer, inputs("linear", dtype=dtype).requires_grad_())
    assert not [
        s for s in shapes if (s[-1] == 7 and len(s) == 3) or s in ((TOKENS, 7), (7, TOKENS))
    ], shapes


@pytest.mark.parametrize("shape", [(24, 7), (4, 6, 7), (7,), (0, 7)])
def test_dropout_has_the_gradient_of_its_own_mask(shape):
    x, A = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 7, dtype=torch.float64),
    )
    torch.manual_seed(5)
    found = frozen.down(x, A, 0.4, training=True)
    torch.manual_seed(5)
    words = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32)
    mask = frozen.mask(x.numel() // 7, 7, words, 0.4).reshape(shape)
    wanted = (x * mask / 0.6) @ A.t()
    check_close(found, wanted, torch.float64)
    g = torch.randn_like(wanted)
    check_close(*(torch.autograd.grad((y * g).sum(), x)[0] for y in (found, wanted)), torch.float64)
    if x.numel():
        assert torch.autograd.gradcheck(lambda x: _seeded(x, A), (x,))


def _seeded(x, A):
    torch.manual_seed(5)
    return frozen.down(x, A, 0.4, training=True)


def test_the_mask_is_fair_in_every_row_and_column_and_between_them():
    masks = torch.stack(
        [
            frozen.mask(300, 200, torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32), 0.3)
            for _ in range(20)
        ]
    ).double()
    assert masks.mean().item() == pytest.approx(0.7, abs=0.002)
    for dim in (1, 2):
        assert (masks.mean(dim) - 0.7).abs().max() < 0.16  # 5 standard errors of 200 draws
    centred = (masks - 0.7) / 0.21**0.5
    for other in (
        centred.roll(1, 0),
        centred.roll(1, 1),
        centred.roll(1, 2),
        centred.roll((7, 3), (1, 2)),
    ):
        assert (centred * other).mean().abs() < 0.005  # 1.2 million pairs


def test_recomputation_and_a_seed_repeat_the_mask():
    a = awake("LoRAFA", dropout=0.5)
    a.model.train()
    torch.manual_seed(3)
    first = a.run()
    torch.manual_seed(3)
    assert same_bits(a.run(), first)
    assert not torch.equal(a.run(), first)


def test_a_is_frozen_never_saved_and_comes_back_from_any_cast(tmp_path):
    a = awake("LoRAFA")
    before = {m: s.A.clone() for m, s in a.adapter.sites.items()}
    assert not any(
        "A" in name.split(".")
        for name in (*a.model.state_dict(), *dict(a.adapter.named_parameters()))
    )
    weft.save(a.model, tmp_path)
    assert all(key.startswith("B.") for key in load_file(tmp_path / "adapter_model.safetensors"))
    for there in (torch.bfloat16, torch.float64):
        a.model.to(there)
        assert a.adapter.sites["mid"].A.dtype == there
    a.model.to(torch.float32)
    loaded = weft.load(net(), tmp_path)
    with torch.device("meta"):
        empty = net()
    moved = weft.attach(empty, a.config)
    empty.to_empty(device="cpu")
    for module, A in before.items():
        for adapter in (a.adapter, loaded, moved):
            assert same_bits(adapter.sites[module].A, A)
    assert not torch.equal(before["layer"][:, :7], before["mid"][:, :7])


def test_a_does_not_depend_on_what_wrappers_put_into_names(tmp_path):
    inner = net()
    outer = nn.ModuleDict({"model": nn.ModuleDict({"language_model": net()})})
    one = weft.attach(inner, config("LoRAFA"))
    two = weft.attach(outer, config("LoRAFA"))
    for module, site in one.sites.items():
        assert same_bits(site.A, two.sites[f"model.language_model.{module}"].A)


WRAPPERS = (
    "module",
    "base_model",
    "model",
    "language_model",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_is_uniform_within_its_bound_and_a_function_of_seed_and_name(kind):
    """The files hold no A, so these bits are a promise: the numbers below may never change."""

    def drawn(site, seed=7, r=50):
        return weft.LoRAFA(r=r).frozen(
            11, 40, kind == "embedding", Rng(seed, site, torch.device("cpu"))
        )["A"]

    A, bound = drawn("a.layer"), 1.0 if kind == "embedding" else 40**-0.5
    assert (
        0.99 * bound < A.max() <= bound
        and -bound <= A.min() < -0.99 * bound
        and abs(A.mean()) < 0.05 * bound
    )
    assert (A[0, :3] / bound).tolist() == pytest.approx(GOLDEN, abs=1e-6)
    assert same_bits(drawn("a.layer", r=3), A[:3])
    assert not torch.equal(drawn("a.layer", seed=8), A) and not torch.equal(drawn("b.layer"), A)
    for part in WRAPPERS:
        assert same_bits(drawn(f"{part}.a.{part}.layer"), A), part


def test_another_a_than_the_one_that_was_saved_is_refused(tmp_path, monkeypatch):
    a = awake("LoRAFA")
    weft.save(a.model, tmp_path)
    drawn = weft.LoRAFA.frozen
    monkeypatch.setattr(
        weft.LoRAFA, "frozen", lambda *args: {k: v * 1.5 for k, v in drawn(*args).items()}
    )
    model = net()
    with pytest.raises(
        weft.CheckpointError, match="frozen tensors drawn from seed 7 have checksum"
    ):
        weft.load(model, tmp_path)
    assert not weft.adapters(model)
    assert "frozen tensors" in str(weft.load(model, tmp_path, strict=False))
    with pytest.raises(weft.CheckpointError, match="frozen tensors"):
        weft.export(tmp_path, "lora", tmp_path / "out")


@pytest.mark.parametrize("rslora", [False, True])
def test_preconditioned_steps_are_those_of_peft_s_optimiser(rslora, monkeypatch):
    """Its AdamW adds eps without bias correction, so eps is nothing here; and it rounds to bfloat16
    unless told not to.
    """
    import peft
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    mine = net()
    adapter = weft.attach(mine, config("LoRAFA", rslora=rslora, precondition=True))
    theirs = peft.get_peft_model(
        net(),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["layer", "mid"], use_rslora=rslora),
    )
    for p in theirs.parameters():
        p.data += 0.3 * torch.randn_like(p) if p.requires_grad else 0
    for module, site in adapter.sites.items():
        layer = theirs.base_model.model.get_submodule(module)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(site.A)
            site.B.copy_(layer.lora_B["default"].weight)
    optimisers = [
        torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-30),
        create_lorafa_optimizer(theirs, r=3, lora_alpha=5, lr=1e-2),
    ]
    optimisers[1].param_groups[0]["eps"] = 1e-30
    for step in range(4):
        x = inputs("linear", seed=step)
        for model, optimiser in zip((mine, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            model(x).sub(1).pow(2).mean().backward()
            optimiser.step()
        for module, site in adapter.sites.items():
            check_close(
                site.B,
                theirs.base_model.model.get_submodule(module).lora_B["default"].weight,
                torch.float32,
            )


def test_the_gradient_is_preconditioned_as_the_equation_says_or_left_alone():
    for precondition in (False, True):
        a = awake("LoRAFA", precondition=precondition)
        a.run().pow(2).sum().backward()
        before = [p.grad.clone() for p in a.adapter.parameters()]
        torch.optim.SGD(a.adapter.parameters(), lr=0.1).step()
        for site, g in zip(a.adapter.sites.values(), before, strict=True):
            gram = (site.A @ site.A.t()).double() + 1e-8 * torch.eye(R)
            wanted = g.double() @ gram.inverse() / (5 / 3) ** 2 if precondition else g
            check_close(site.B.grad, wanted, torch.float32)
        same = all(
            torch.equal(p.grad, g) for p, g in zip(a.adapter.parameters(), before, strict=True)
        )
        assert same != precondition


def test_every_layer_is_preconditioned_with_its_own_scale_also_where_a_has_more_rows_than_columns():
    """In float64, where the 1e-8 on the diagonal is what makes A Aᵀ invertible."""
    targets = {"layer": {"r": 9, "alpha": 4.0}, "mid": {"alpha": 7.0}}
    a = awake("LoRAFA", dtype=torch.float64, held="float64", precondition=True, targets=targets)
    a.run().pow(2).sum().backward()
    before = {m: s.B.grad.clone() for m, s in a.adapter.sites.items()}
    torch.optim.SGD(a.adapter.parameters(), lr=0.1).step()
    for (module, site), scale in zip(a.adapter.sites.items(), (4 / 9, 7 / 3), strict=True):
        gram = site.A @ site.A.t() + 1e-8 * torch.eye(len(site.A), dtype=torch.float64)
        check_close(site.B.grad, before[module] @ gram.inverse() / scale**2, torch.float32, module)


def test_preconditioning_takes_bfloat16_and_layers_that_were_not_called():
    a = awake("LoRAFA", held="bfloat16", precondition=True)
    a.model.mid(torch.randn(4, 11)).pow(2).sum().backward()
    before = a.adapter.sites["mid"].B.grad.clone()
    torch.optim.SGD(a.adapter.parameters(), lr=0.1).step()
    assert a.adapter.sites["layer"].B.grad is None and not torch.equal(
        a.adapter.sites["mid"].B.grad, before
    )


def test_dropout_s_gradient_has_the_dtype_of_the_input_under_autocast():
    x, A = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = frozen.down(x, A, 0.4, training=True)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    dropped = x.grad == 0
    assert x.grad.dtype == torch.float32 and 0 < dropped.sum() < x.numel()
    check_close(x.grad, torch.where(dropped, 0.0, A.sum(0) / 0.6), torch.bfloat16)


def test_dropout_compiles_into_one_graph():
    a = awake("LoRAFA", dropout=0.5)
    a.model.train()
    compiled = torch.compile(a.model, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(a.x), compiled(a.x))
    compiled(a.x).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in a.adapter.parameters())
