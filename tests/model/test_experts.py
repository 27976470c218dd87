"""Fused experts: every method against a loop over tokens and experts, and what is refused by name."""

import copy

import pytest
import torch
from torch import nn

import moe
import weft
from bases_record import exact, refused
from support import config
from weft.analysis.changes import changes_of

VARIANTS = [
    "LoRA",
    "LoRA:init=pissa",
    "LoRA:rslora=True",
    "LoRAFA",
    "VeRA",
    "DoRA",
    "DoRA:norm_grad=exact",
    "DVoRA",
]
NAMES = list(moe.MODELS)
BASES = {
    "mixtral": "experts of Mixtral",
    "qwen3_moe": "experts of Qwen3-MoE",
    "olmoe": "experts of OLMoE",
    "gpt_oss": "experts of gpt-oss",
    "deepseek_v3": "experts of DeepSeek-V3",
    "llama4_text": "experts of Llama 4",
    "aria_text": "experts of Aria",
    "nemotron_h": "experts of Nemotron-H",
}


def _alone(name, variant, **changes):
    host = moe.Alone(name)
    adapter = weft.attach(
        host, config(variant, **{"targets": "experts", "dtype": "float64", **changes})
    )
    for layer in adapter.layers.values():
        if layer.shared is not None:
            layer.shared.double()
    moe.move(adapter)
    return host, adapter


def _by_definition(host, adapter, tensors, given):
    weights = {}
    for name, layer in adapter.layers.items():
        tensor = name.rpartition(".")[2]
        own = {n: tensors[f"{name}.{n}"] for n in layer.names}
        weights[tensor] = moe.effective(layer, moe.stored(host.experts, tensor), own)
    return moe.by_definition(host.experts, weights, given)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_output_and_gradients_are_those_of_a_loop_over_experts(name, variant):
    host, adapter = _alone(name, variant)
    hidden, index, weights = moe.call()
    host.train()
    slope = torch.linspace(-1, 2, hidden.numel(), dtype=torch.float64).view_as(hidden)
    ways = []
    for definition in (False, True):
        x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        tensors = dict(adapter.named_parameters())
        given = (x, index, w)
        y = _by_definition(host, adapter, tensors, given) if definition else host(*given)
        found = torch.autograd.grad((y * slope).sum(), [x, w, *tensors.values()])
        ways.append([y.detach(), *found])
    names = ["output", "hidden", "weights", *dict(adapter.named_parameters())]
    for what, a, b in zip(names, *ways, strict=True):
        gap = float((a - b).norm() / b.norm())
        assert gap <= 1e-14, (what, gap)
    for what, g in zip(names[3:], ways[0][3:], strict=True):
        assert not g[3].any() and g[0].any(), what  # expert 3 has no token
    if ":" not in variant:
        exact(BASES[name], variant, "transformers")


@pytest.mark.parametrize("variant", ["LoRA", "DoRA", "VeRA", "DVoRA", "LoRAFA"])
@pytest.mark.parametrize("name", NAMES)
def test_a_models_output_is_that_of_its_effective_weights(name, variant):
    model, ids = moe.model(name), moe.ids()
    with torch.no_grad():
        base = model(input_ids=ids).logits
        adapter = weft.attach(model, config(variant, targets="experts"))
        assert torch.equal(model(input_ids=ids).logits, base) or torch.allclose(
            model(input_ids=ids).logits, base, atol=1e-6
        )
        moe.move(adapter)
        other = copy.deepcopy(model)
        weft.detach(other)
        for layer_name, layer in adapter.layers.items():
            where, _, tensor = layer_name.rpartition(".")
            stored = getattr(other.get_submodule(where), tensor)
            tensors = {n: p.double() for n, p in layer.trainable().items()}
            W = moe.effective(layer, layer.base.weight(), tensors)
            new = torch.stack(W).to(stored.dtype)
            stored.copy_(new.mT if layer.base.turned else new)
        found, wanted = model(input_ids=ids).logits, other(input_ids=ids).logits
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert (found - base).abs().max() > 2e-3 * base.abs().max()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_the_base_gives_the_same(implementation):
    model, ids = moe.model("qwen3_moe"), moe.ids()
    adapter = weft.attach(model, weft.DoRA(r=3, targets="experts"))
    moe.move(adapter)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        model.set_experts_implementation(implementation)
        base = model.model
        with weft.use(model, None):
            own = model(input_ids=ids).logits
        assert base is model.model and not torch.allclose(own, wanted, atol=1e-3)
        assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-6)


def test_a_kernel_of_its_own_is_refused_before_and_after_attach():
    model = moe.model("qwen3_moe")
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(
        weft.TargetError, match=r"'sonicmoe' is a kernel.*set_experts_implementation"
    ):
        weft.attach(model, weft.LoRA(r=2, targets="experts"))
    model.config._experts_implementation = "grouped_mm"
    weft.attach(model, weft.LoRA(r=2, targets="experts"))
    model.config._experts_implementation = "deepgemm"
    with pytest.raises(weft.WeftError, match="'deepgemm' is a kernel"):
        model(input_ids=moe.ids())


class _Parallel(nn.Module):
    """Fused experts of an unknown class."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(4, 6, 3))
        self.proj = nn.Linear(3, 3)

    def forward(self, x):
        return self.proj(x + (x @ self.experts.gate_up_proj[0].t())[..., :3])


@pytest.mark.parametrize("targets", ["experts", ["gate_up_proj"]])
def test_an_unknown_class_of_fused_experts_is_refused_by_name(targets):
    why = r"experts\.gate_up_proj.*Module reads by a forward of its own, which Weft does not know"
    with pytest.raises(weft.TargetError, match=why):
        weft.attach(_Parallel(), weft.LoRA(r=2, targets=targets))


def test_a_class_whose_forward_computes_something_else_is_refused():
    model = moe.model("mixtral")
    experts = model.model.layers[0].mlp.experts

    def gate(self, y):
        return y.chunk(2, dim=-1)[0] + float(torch.rand(()))

    type(experts)._apply_gate, before = gate, type(experts)._apply_gate
    try:
        from weft.model.base_layers import experts as kind

        kind._faults.clear()
        with pytest.raises(weft.TargetError, match="computes something else"):
            weft.attach(model, weft.LoRA(r=2, targets="experts"))
    finally:
        type(experts)._apply_gate = before
        kind._faults.clear()


@pytest.mark.parametrize("variant", ["AdaLoRA", "DyLoRA", "Bottleneck"])
def test_a_method_that_cannot_adapt_experts_says_so(variant):
    reason = {
        "AdaLoRA": "AdaLoRA acts on the ranks of each weight, or between optimiser steps",
        "DyLoRA": "DyLoRA acts on the ranks of each weight, or between optimiser steps",
        "Bottleneck": "Bottleneck is no low-rank change of a weight",
    }[variant]
    why = rf"holds 5 fused experts, and {reason}.*exclude=\[.experts.\]"
    for name in NAMES if variant != "Bottleneck" else NAMES[:1]:
        with pytest.raises(weft.TargetError, match=why):
            weft.attach(moe.model(name), config(variant, targets="experts"))
        if variant != "Bottleneck":
            refused(BASES[name], variant, reason, "transformers")
    with pytest.raises(weft.TargetError, match="LoRAFA acts on"):
        weft.attach(moe.model("mixtral"), weft.LoRAFA(precondition=True, targets="experts"))


def test_names_choose_experts_and_all_linear_leaves_them_out():
    model = moe.model("deepseek_v3")
    every = weft.attach(model, weft.LoRA(r=2))
    assert not any("mlp.experts" in name for name in every.layers)
    left = {f.name: f for f in every.frozen}["model.layers.1.mlp.experts.down_proj"]
    assert left.shape == (5, 24, 20) and "fused experts" in left.reason
    weft.detach(model)
    named = weft.attach(model, weft.LoRA(r=2, targets=["down_proj"]))
    assert set(named.layers) == {
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.mlp.shared_experts.down_proj",
    }
    weft.detach(model)
    both = weft.attach(model, weft.LoRA(r=2, targets=["all-linear", "experts"]))
    assert len(both.layers) == len(every.layers) + 2
    weft.detach(model)
    own = weft.attach(model, weft.LoRA(r=2, targets={"down_proj": {"r": 3}}, exclude=["experts"]))
    assert not any("mlp.experts" in name for name in own.layers) and len(own.layers) == 2


def test_detach_restores_the_module_and_its_keys():
    model = moe.model("mixtral")
    keys, classes = set(model.state_dict()), [type(m) for m in model.modules()]
    weft.attach(model, weft.DoRA(r=2, targets="experts"), "a")
    weft.attach(model, weft.LoRA(r=2, targets=["experts.down_proj"]), "b")
    assert keys < set(model.state_dict())
    weft.detach(model, "a")
    assert {k.rpartition("weft.")[2] for k in set(model.state_dict()) - keys} == {
        "down_proj.b.A",
        "down_proj.b.B",
    }
    weft.detach(model, "b")
    assert set(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("variant", ["LoRA", "DVoRA"])
@pytest.mark.parametrize("name", NAMES)
def test_merge_and_unmerge(name, variant):
    model, ids = moe.model(name), moe.ids()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = weft.attach(model, config(variant, targets="experts"))
    moe.move(adapter)
    experts = next(iter(adapter.layers.values())).base.module
    own = weft.effective_weight(experts, tensor="down_proj")
    with pytest.raises(weft.WeftError, match="down_proj"):
        weft.effective_weight(experts)
    report = weft.merge(model, verify={"input_ids": ids})
    assert report.weights == len(adapter.layers) and report.effect > 1e-3
    assert torch.equal(own, weft.effective_weight(experts, tensor="down_proj"))
    weft.unmerge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    exact(BASES[name], "merge", "transformers")


def test_a_copy_and_a_pickle_compute_the_same():
    import io

    model, ids = moe.model("mixtral"), moe.ids()
    adapter = weft.attach(model, weft.DoRA(r=2, targets="experts"))
    moe.move(adapter)
    wanted = model(input_ids=ids).logits
    assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, wanted)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(input_ids=ids).logits, wanted)


def test_with_strengths_every_layer_adds_its_changes():
    host, first = _alone("gpt_oss", "DoRA")
    second = weft.attach(host, config("VeRA", targets=["down_proj"], dtype="float64"), "b")
    next(iter(second.layers.values())).shared.double()
    moe.move(second, 9)
    given = moe.call()
    weights = {t: list(moe.stored(host.experts, t)) for t in ("gate_up_proj", "down_proj")}
    for adapter, strength in ((first, 0.7), (second, -0.4)):
        for name, layer in adapter.layers.items():
            tensor = name.rpartition(".")[2]
            W = moe.stored(host.experts, tensor)
            own = moe.effective(layer, W, dict(layer.trainable()))
            weights[tensor] = [
                a + strength * (b - w) for a, b, w in zip(weights[tensor], own, W, strict=True)
            ]
    wanted = moe.by_definition(host.experts, weights, given)
    with weft.use(host, {"default": 0.7, "b": -0.4}):
        assert (host(*given) - wanted).abs().max() <= 1e-13 * wanted.abs().max()


@pytest.mark.parametrize("name", [n for n in NAMES if n != "nemotron_h"])
def test_each_row_of_a_batch_gets_its_own_adapter(name):
    model, ids = moe.model(name), moe.ids(4)
    for seed, (own, method) in enumerate(
        {
            "a": weft.DoRA(r=2, targets="experts"),
            "b": weft.VeRA(r=3, targets=["down_proj"]),
            "c": weft.LoRA(r=4, targets=["all-linear", "experts"]),
        }.items()
    ):
        moe.move(weft.attach(model, method, own), seed)
    names = ["b", None, "a", "c"]
    with torch.no_grad():
        alone = []
        for row, own in enumerate(names):
            with weft.use(model, own):
                alone.append(model(input_ids=ids[row : row + 1]).logits)
        with weft.use(model, names):
            found = model(input_ids=ids).logits
        wanted = torch.cat(alone)
        assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()
        assert all(
            (wanted[i] - model(input_ids=ids).logits[i]).abs().max() > 1e-3 for i in range(3)
        )


def test_rows_reach_the_gradients_of_their_own_adapter_only():
    model, ids = moe.model("qwen3_moe"), moe.ids(3)
    first = weft.attach(model, weft.DoRA(r=2, targets="experts"), "a")
    second = weft.attach(model, weft.LoRA(r=2, targets="experts"), "b")
    moe.move(first), moe.move(second, 5)
    model.train()
    grads = []
    for rows in (["a", "b", "a"], "a"):
        first.model.zero_grad()
        with weft.use(model, rows):
            y = model(input_ids=ids).logits
            y[[0, 2]].square().sum().backward()
        assert all((p.grad is None or not p.grad.any()) for p in second.parameters())
        grads.append([p.grad.clone() for p in first.parameters()])
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_a_sum_of_adapters_is_one_adapter():
    model, ids = moe.model("gpt_oss"), moe.ids()
    moe.move(weft.attach(model, weft.DoRA(r=2, targets="experts"), "a"))
    moe.move(weft.attach(model, weft.VeRA(r=3, targets=["all-linear", "experts"]), "b"), 9)
    with torch.no_grad():
        with weft.use(model, {"a": 0.6, "b": 0.5}):
            wanted = model(input_ids=ids).logits
        weft.combine(model, {"a": 0.6, "b": 0.5}, "both")
        found = model(input_ids=ids).logits
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_training_is_audited_and_the_base_stays_still():
    model, ids = moe.model("qwen3_moe"), moe.ids()
    adapter = weft.attach(model, weft.DVoRA(r=4, targets=["all-linear", "experts"]))
    model.train()
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    before = weft.snapshot(model)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    weft.audit(model, before, weft.snapshot(model))


def test_kept_norms_follow_every_change():
    host, adapter = _alone("mixtral", "DoRA")
    given, layer = moe.call(), adapter.layers["experts.down_proj"]

    def check():
        weights = {
            t: moe.effective(
                adapter.layers[f"experts.{t}"],
                moe.stored(host.experts, t),
                dict(adapter.layers[f"experts.{t}"].trainable()),
            )
            for t in ("gate_up_proj", "down_proj")
        }
        wanted = moe.by_definition(host.experts, weights, given)
        assert (host(*given) - wanted).norm() <= 1e-13 * wanted.norm()

    with torch.no_grad():
        check()
        check()
        layer.B[2, 0, 0] += 1.0
        check()
        host.experts.down_proj[4].mul_(2)
        check()
        layer.A.data = layer.A.data.clone().mul_(1.5)
        check()
        assert not layer.is_stale()
        host.experts.down_proj.data[1, 3, 5] += 50  # where no call looks
        assert layer.is_stale()
        check()


def test_a_plan_counts_experts_without_weights():
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = moe.model("mixtral")
    adapter = weft.attach(model, weft.LoRA(r=2, targets=["all-linear", "experts"]))
    own = moe.model("mixtral")
    assert adapter.plan().trainable == weft.attach(own, adapter.config).num_parameters
    rows = {row.name: row.shape for row in adapter.plan().rows}
    assert rows["model.layers.0.mlp.experts.gate_up_proj"] == (5, 72, 24)


def test_all_linear_says_which_share_the_experts_are():
    model = moe.model("mixtral", num_local_experts=16)
    with pytest.warns(UserWarning, match=r"leaves out 90.8 % .*experts 90.8 %.*targets=.experts"):
        weft.attach(model, weft.LoRA(r=2))
    weft.detach(model)
    weft.attach(model, weft.LoRA(r=2, exclude=["experts"]))  # as it is meant: no warning


def test_an_analysis_has_every_weight_of_the_experts():
    model = moe.model("mixtral")
    moe.move(weft.attach(model, weft.DoRA(r=2, targets=["o_proj", "experts"])))
    names = [name for name, _ in changes_of(weft.adapters(model)["default"])]
    assert names[:3] == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]


def test_a_choice_that_is_no_expert_adds_nothing():
    """Routers mask a choice with the number of experts."""
    host, adapter = _alone("qwen3_moe", "DoRA")
    hidden, index, weights = moe.call()
    index[2, 1] = index[4] = moe.E
    x = hidden.clone().requires_grad_()
    found = host(x, index, weights)
    parts = []
    for t in range(len(hidden)):
        kept = index[t : t + 1, index[t] < moe.E]
        given = (hidden[t : t + 1], kept, weights[t : t + 1, index[t] < moe.E])
        tensors = dict(adapter.named_parameters())
        parts.append(
            _by_definition(host, adapter, tensors, given)[0]
            if kept.numel()
            else torch.zeros_like(hidden[t])
        )
    wanted = torch.stack(parts)
    assert (found - wanted).norm() <= 1e-14 * wanted.norm()
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert not gradient[4].any() and gradient[2].any()


def test_experts_behind_a_hook_that_moves_inputs():
    """accelerate's hooks of a device_map; those that offload are refused."""
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, ids = moe.model("mixtral"), moe.ids()
    adapter = weft.attach(model, weft.DoRA(r=2, targets="experts"))
    moe.move(adapter)
    wanted = model(input_ids=ids).logits
    other = moe.model("mixtral")
    for experts in moe.experts_of(other).values():
        add_hook_to_module(experts, AlignDevicesHook(execution_device="cpu"))
    second = weft.attach(other, adapter.config)
    moe.move(second)
    assert torch.equal(other(input_ids=ids).logits, wanted)
    weft.detach(other)
    cpu_offload(model, execution_device=torch.device("cpu"))  # after attach
    assert torch.equal(model(input_ids=ids).logits, wanted)
    assert not any(len(layer.cache) for layer in adapter.layers.values())
    third = moe.model("mixtral")
    for experts in moe.experts_of(third).values():
        add_hook_to_module(experts, AlignDevicesHook(execution_device="cpu", offload=True))
    with pytest.raises(weft.TargetError, match="offload"):
        weft.attach(third, adapter.config)
