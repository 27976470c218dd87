"""Merge equals forward, unmerge gives every bit back, and nothing is merged twice or in silence."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import weft
from support import (
    KINDS,
    MERGEABLE,
    SELECTIONS,
    TURNS_WEIGHTS,
    VARIANTS,
    awake,
    check_close,
    config,
    distance,
    inputs,
    move,
    net,
    oracle_output,
    oracle_weight,
    same_bits,
)


def bits(model):
    """The base's tensors, bit for bit, whatever is active."""
    with weft.use(model, None) if weft.adapters(model) else torch.no_grad():
        return {k: v.clone() for k, v in model.state_dict().items() if ".weft." not in k}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", MERGEABLE)
def test_merge_equals_forward_and_unmerge_restores_every_bit(variant, kind, dtype):
    a = awake(variant, kind, dtype)
    before, attached = bits(a.model), a.run()
    report = weft.merge(a.model, verify=a.x)
    merged = {k: v.clone() for k, v in a.model.state_dict().items() if ".weft." not in k}
    assert any(not torch.equal(merged[k], before[k]) for k in before)
    check_close(a.run(), attached, dtype)
    check_close(a.run(), oracle_output(a, a.declared()), dtype)
    assert report.output_error <= report.tolerance < report.effect
    weft.unmerge(a.model)
    after = bits(a.model)
    assert after.keys() == before.keys()
    assert all(same_bits(after[k], before[k]) for k in before)
    assert same_bits(a.run(), attached)


@pytest.mark.parametrize("variant", TURNS_WEIGHTS)
def test_the_merged_weight_is_the_effective_weight_cast_once(variant):
    for dtype in (torch.float32, torch.bfloat16):
        a = awake(variant, "conv1d", dtype)
        wanted = {m: weft.effective_weight(a.model.get_submodule(m)) for m in a.adapter.sites}
        weft.merge(a.model)
        for module, W in wanted.items():
            layer = a.model.get_submodule(module)
            stored = layer.weight.t() if module == "layer" else layer.weight
            assert same_bits(stored, W.to(dtype))
            assert same_bits(weft.effective_weight(layer), W), (
                "W' must not be computed from a merged weight"
            )
            check_close(W, oracle_weight(a, module, a.declared()), torch.float32)


@pytest.mark.parametrize("variant", MERGEABLE)
def test_ten_rounds_of_merging_change_no_bit(variant):
    a = awake(variant, dtype=torch.bfloat16)
    before = bits(a.model)
    for _ in range(10):
        weft.merge(a.model)
        weft.unmerge(a.model)
    assert all(same_bits(v, before[k]) for k, v in bits(a.model).items())


@pytest.mark.parametrize("variant", MERGEABLE)
def test_a_merged_adapter_answers_once_whoever_asks(variant):
    """Switched on by name, it must not be added to the weights that hold it already."""
    a = awake(variant)
    attached = a.run()
    weft.merge(a.model)
    with weft.use(a.model, "default"):
        check_close(a.run(), attached, torch.float32)
    check_close(a.run(), attached, torch.float32)
    for asked in (None, ["default"] * 4, [None] * 4):
        with pytest.raises(weft.MergeError, match=r"'default' is merged.*weft\.unmerge"):
            weft.use(a.model, asked)
    weft.unmerge(a.model)
    check_close(a.run(), attached, torch.float32)


def test_what_was_active_before_a_merge_is_active_after_it():
    a = awake("LoRA")
    awake("DoRA", name="other", model=a.model)
    for active in ("other", None, ["default", None, "other", "other"]):
        with weft.use(a.model, active):
            before = a.run()
            weft.merge(a.model, "default", verify=a.x)
            weft.unmerge(a.model)
            assert same_bits(a.run(), before)


def test_verify_takes_a_tensor_a_tuple_or_keywords():
    a = awake("LoRA")
    for given in (a.x, (a.x,), {"x": a.x}):
        assert weft.merge(a.model, verify=given).output_error is not None
        weft.unmerge(a.model)


@pytest.mark.parametrize("variant", MERGEABLE)
def test_a_merge_that_changes_the_outputs_too_much_is_refused_and_undone(variant):
    a = awake(variant, dtype=torch.bfloat16)
    before, attached = bits(a.model), a.run()
    if variant in SELECTIONS:  # nothing is rounded, so nothing can be refused
        assert weft.merge(a.model, verify=a.x, tolerance=0).output_error == 0
        return
    with pytest.raises(
        weft.MergeError, match=r"'default' changed the outputs by .*so the base was put back"
    ):
        weft.merge(a.model, verify=a.x, tolerance=1e-6)
    assert all(same_bits(v, before[k]) for k, v in bits(a.model).items())
    assert same_bits(a.run(), attached)
    weft.merge(a.model)  # nothing is merged


def test_verify_sees_a_forward_that_does_not_use_the_weight():
    """A layer whose output is not its weight's, here through a hook, cannot be merged, and says
    so.
    """
    a = awake("LoRA", targets=["head"])
    a.model.head.register_forward_hook(
        lambda module, args, out: out * (2.0 if module.weight.abs().max() > 20 else 1.0)
    )
    with torch.no_grad():
        a.adapter.sites["head"].B.mul_(1e3)
    with pytest.raises(weft.MergeError, match="changed the outputs"):
        weft.merge(a.model, verify=a.x)
    weft.merge(a.model)


def test_an_error_while_the_merged_outputs_are_taken_puts_the_base_back():
    a = awake("LoRA")
    before, calls = bits(a.model), []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 3:  # attached, base, merged
            raise RuntimeError("out of memory")

    hook = a.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        weft.merge(a.model, verify=a.x)
    hook.remove()
    assert all(same_bits(v, before[k]) for k, v in bits(a.model).items())
    weft.merge(a.model, verify=a.x)


def test_verify_runs_in_eval_mode_and_leaves_the_modes_alone():
    a = awake("LoRA", dropout=0.5)
    a.model.train()
    a.model.mid.eval()
    modes = [m.training for m in a.model.modules()]
    weft.merge(a.model, verify=a.x)
    assert [m.training for m in a.model.modules()] == modes


def test_a_model_without_numbers_to_compare_is_refused():
    class Says(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(7, 11)

        def forward(self, x):
            return self.layer(x).argmax()

    model = Says()
    weft.attach(model, weft.LoRA(r=3))
    with pytest.raises(weft.MergeError, match="no floating-point tensor"):
        weft.merge(model, verify=inputs("linear"))


def test_while_one_is_merged_no_other_is_merged_attached_detached_or_used():
    a = awake("LoRA")
    awake("VeRA", name="b", model=a.model)
    weft.merge(a.model, "default")
    for call in (
        lambda: weft.merge(a.model, "b"),
        lambda: weft.merge(a.model, "default"),
        lambda: weft.attach(a.model, weft.LoRA(r=2), name="c"),
        lambda: weft.detach(a.model, "b"),
        lambda: weft.detach(a.model, "default"),
        lambda: weft.use(a.model, "b"),
    ):
        with pytest.raises(weft.MergeError, match=r"'default' is (already )?merged"):
            call()
    weft.unmerge(a.model)
    with pytest.raises(weft.MergeError, match="nothing is merged"):
        weft.unmerge(a.model)


def test_keep_merged_leaves_the_effective_weights_for_good():
    for variant in MERGEABLE:
        a = awake(variant)
        attached, keys = a.run(), {k for k in a.model.state_dict() if ".weft." not in k}
        weft.merge(a.model)
        weft.detach(a.model, keep_merged=True)
        assert not weft.adapters(a.model) and type(a.model.layer) is nn.Linear
        assert set(a.model.state_dict()) == keys
        check_close(a.run(), attached, torch.float32)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in MERGEABLE])
def test_what_is_no_change_of_weights_is_refused_and_left_as_it_is(variant):
    a = awake(variant)
    before, attached = bits(a.model), a.run()
    with pytest.raises(
        weft.UnsupportedError,
        match=rf"{type(a.config).__name__} is not a change of weights, so it "
        r"cannot be merged: \w+ ",
    ):
        weft.merge(a.model, verify=a.x)
    assert all(same_bits(v, before[k]) for k, v in bits(a.model).items())
    assert same_bits(a.run(), attached)
    with pytest.raises(weft.MergeError, match="nothing is merged"):
        weft.unmerge(a.model)
    weft.detach(a.model)


def test_a_method_that_cannot_be_merged_is_refused(monkeypatch):
    a = awake("LoRA")
    monkeypatch.setattr(weft.LoRA, "mergeable", False)
    with pytest.raises(weft.UnsupportedError, match="LoRA is not a change of weights"):
        weft.merge(a.model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_before_anything_is_touched(value):
    a = awake("DoRA")
    before = bits(a.model)
    with torch.no_grad():
        a.adapter.sites["mid"].A[1, 2] = value
    with pytest.raises(weft.MergeError, match=r"'mid\.A' holds NaN or infinity"):
        weft.merge(a.model)
    assert all(same_bits(v, before[k]) for k, v in bits(a.model).items())


def test_a_weight_that_overflows_its_dtype_is_refused_and_what_was_written_is_put_back():
    a = awake("LoRA")
    model = a.model.half()
    before = bits(model)
    with torch.no_grad():
        a.adapter.sites["mid"].B.fill_(6e4)
    with pytest.raises(weft.MergeError, match=r"'mid': W' is not finite in torch\.float16"):
        weft.merge(model)
    assert all(same_bits(v, before[k]) for k, v in bits(model).items())


@pytest.mark.parametrize("variant", TURNS_WEIGHTS)
def test_merging_under_autocast_writes_the_same_bits(variant):
    plain, cast = awake(variant), awake(variant)
    weft.merge(plain.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weft.merge(cast.model)
    for module in plain.adapter.sites:
        assert same_bits(
            plain.model.get_submodule(module).weight, cast.model.get_submodule(module).weight
        )


def test_the_effective_weight_is_over_the_base_while_another_adapter_stands_in_its_place():
    a = awake("LoRA")
    alone = weft.effective_weight(a.model.layer)
    awake("Full", name="full", model=a.model)
    assert same_bits(weft.effective_weight(a.model.layer, "default"), alone)
    weft.merge(a.model, "full")
    assert same_bits(weft.effective_weight(a.model.layer, "default"), alone)
    weft.unmerge(a.model)
    weft.use(a.model, None)
    assert same_bits(weft.effective_weight(a.model.layer, "default"), alone)


def test_the_effective_weight_of_a_layer_without_the_adapter_is_refused():
    a = awake("LoRA")
    with pytest.raises(
        weft.WeftError, match=r"Linear carries no adapter 'other' \(it has: \['default'\]\)"
    ):
        weft.effective_weight(a.model.layer, "other")
    with pytest.raises(
        weft.WeftError, match=r"Linear carries no adapter 'default' \(it has: \[\]\)"
    ):
        weft.effective_weight(a.model.head)


def test_the_report_measures_rounding_change_and_effect():
    a = awake("LoRA", dtype=torch.bfloat16)
    base = {m: a.base[f"{m}.weight"] for m in a.adapter.sites}
    wanted = {m: oracle_weight(a, m, a.declared()).detach() for m in base}
    attached = a.run().detach()
    with weft.use(a.model, None):
        without = a.run()
    report = weft.merge(a.model, verify=a.x)
    assert report.weights == 2
    assert report.change == pytest.approx(
        max(float((wanted[m] - base[m]).norm() / base[m].norm()) for m in base), rel=1e-4
    )
    assert 0 < report.rounding < 2**-8
    assert report.effect == pytest.approx(distance(attached, without), rel=1e-6)
    text = str(report)
    assert "merged 'default' into 2 weights" in text and "outputs differ by" in text
    weft.unmerge(a.model)
    assert "outputs not verified" in str(weft.merge(a.model))


def test_a_copy_of_a_merged_model_can_be_unmerged_alone():
    a = awake("DoRA")
    before = bits(a.model)
    weft.merge(a.model)
    other = copy.deepcopy(a.model)
    weft.unmerge(other)
    assert all(same_bits(v, before[k]) for k, v in bits(other).items())
    assert distance(a.model.layer.weight, other.layer.weight) > 1e-3
    weft.unmerge(a.model)


def test_every_method_says_whether_it_can_be_merged():
    for method in weft.methods.METHODS.values():
        assert isinstance(method.mergeable, bool) and dataclasses.is_dataclass(method)


def test_a_name_that_is_not_attached_is_refused():
    a = awake("LoRA")
    with pytest.raises(
        weft.WeftError, match=r"no adapter is named 'defualt' on this Net. Nearest: \['default'\]"
    ):
        weft.merge(a.model, "defualt")
    with pytest.raises(weft.WeftError, match="Net carries no adapter"):
        weft.merge(net(), "default")


def test_merging_does_not_depend_on_what_is_active():
    a = awake("VeRA")
    second = weft.attach(a.model, config("LoRA"), name="b")
    move(second)
    weft.use(a.model, "default")
    wanted = a.run()
    weft.use(a.model, "b")
    weft.merge(a.model, "default")
    check_close(a.run(), wanted, torch.float32)


# What happened to the weights since


def edited_through_data(model):
    model.mid.weight.data.mul_(2)


def given_other_data(model):
    model.mid.weight.data = model.mid.weight.data * 2


def edited_through_a_pointer(model):
    model.mid.weight.detach().numpy()[0, 0] += 1


def replaced_module(model):
    model.mid = nn.Linear(11, 9)


def trained(model):
    model.mid.weight.requires_grad_(True)
    model(inputs("linear")).sum().backward()
    torch.optim.SGD([model.mid.weight], lr=1.0).step()


@pytest.mark.parametrize(
    "change",
    [edited_through_data, given_other_data, edited_through_a_pointer, replaced_module, trained],
)
def test_an_edit_that_leaves_no_sign_is_no_part_of_the_base_either(change):
    a = awake("LoRA")
    weft.merge(a.model)
    change(a.model)
    with pytest.raises(weft.MergeError, match=r"'mid\.weight' was .*keep_merged=True"):
        weft.unmerge(a.model)
    weft.detach(a.model, keep_merged=True)


def test_a_merged_model_may_be_cast():
    a = awake("LoRA")
    before = bits(a.model)
    weft.merge(a.model)
    a.model.bfloat16()
    weft.unmerge(a.model)
    assert all(same_bits(v, before[k].bfloat16()) for k, v in bits(a.model).items())


def test_two_weights_in_one_memory_are_put_back_in_order(monkeypatch):
    monkeypatch.setattr("weft.model.merge.problems", lambda *_, **__: [])
    model = nn.ModuleDict({"a": nn.Linear(7, 7), "b": nn.Linear(7, 7)})
    adapter = weft.attach(model, weft.LoRA(r=2, targets=["a", "b"]))
    move(adapter)
    model["b"].weight.data = model["a"].weight.data
    before = model["a"].weight.clone()
    with torch.no_grad():
        for p in adapter.sites["b"].parameters():
            p.fill_(1e30)
    with pytest.raises(weft.MergeError, match="'b': W' is not finite"):
        weft.merge(model)
    assert same_bits(model["a"].weight, before)


@pytest.mark.parametrize("method", ["LoRA", "Full"])
def test_a_state_dict_taken_while_merged_does_not_load_where_the_adapter_counts_again(method):
    a = awake(method)
    weft.merge(a.model)
    merged, here = a.model.state_dict(), a.run()
    assert any("merged.weft.default" in key for key in merged)
    a.model.load_state_dict(merged)  # where it is merged, too
    b = awake(method, model=net(seed=1))
    before = b.run()
    with pytest.raises(weft.MergeError, match="taken while adapter 'default' was merged"):
        b.model.load_state_dict(merged)
    assert same_bits(b.run(), before)
    with pytest.raises(RuntimeError, match=r"merged\.weft\.default"):
        net().load_state_dict(merged)
    weft.detach(a.model, keep_merged=True)
    plain = net()
    plain.load_state_dict(a.model.state_dict())
    check_close(plain(a.x), here, torch.float32)


def test_the_audit_of_a_merged_model_knows_its_tensors():
    a = awake("LoRA")
    before = weft.snapshot(a.model)
    weft.merge(a.model)
    with pytest.raises(weft.AuditError) as caught:
        weft.audit(a.model, before, weft.snapshot(a.model))
    assert "merged.weft" not in str(caught.value)


def test_an_adapter_without_any_effect_is_refused_where_it_is_verified():
    model = net()
    weft.attach(model, config("LoRA"))
    before = bits(model)
    with pytest.raises(
        weft.MergeError, match="does not change the outputs for these inputs at all"
    ):
        weft.merge(model, verify=inputs("linear"))
    assert all(same_bits(v, before[k]) for k, v in bits(model).items())
    assert weft.merge(model).change == 0
