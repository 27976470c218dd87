"""Layers are found by structure: counted by hand on sixteen architectures, then run, merged, mixed
and taken off.
"""

import re
from types import SimpleNamespace

import pytest
import torch

import weft
from architectures import ARCHITECTURES
from support import check_close, config, distance, move, same_bits
from weft.model.structure import Structure
from weft.model.structure.selection import trained_tensors

EACH = pytest.mark.parametrize("name", list(ARCHITECTURES))


def output(model, given):
    found = model(**given)
    return found.logits if hasattr(found, "logits") else found


@EACH
def test_attention_and_mlp_are_counted_right(name):
    want = ARCHITECTURES[name]
    model = want.build()
    sites = {}
    for target, count in (
        ("attention", want.attention),
        ("mlp", want.mlp),
        ("all-linear", want.attention + want.mlp + want.beside),
    ):
        if not count:
            with pytest.raises(weft.TargetError, match=rf"targets='{target}' finds no layer"):
                weft.attach(model, weft.LoRA(r=2, targets=target))
            sites[target] = set()
            continue
        sites[target] = set(weft.attach(model, weft.LoRA(r=2, targets=target)).sites)
        weft.detach(model)
        assert len(sites[target]) == count, target
    assert sites["attention"].isdisjoint(sites["mlp"])
    assert sites["attention"] | sites["mlp"] <= sites["all-linear"]
    beside = sites["all-linear"] - sites["attention"] - sites["mlp"]
    assert len(beside) == want.beside
    assert not any(
        re.search(r"embed_|wte|wpe|lm_head|classifier|gate$|router", s) for s in sites["all-linear"]
    )


@EACH
def test_a_second_adapter_finds_the_layers_that_the_first_found(name):
    """The structure of a model must not contain what Weft has added to it."""
    model = ARCHITECTURES[name].build()
    words = ("biases", "norms", "head", "last:1", "all")
    named = [SimpleNamespace(selection=(word,), train=()) for word in words]
    saved = ["a tensor, so that a word may select nothing"]

    def selected():
        return [trained_tensors(Structure.of(model), one, (), saved) for one in named]

    before = selected()
    first = weft.attach(model, config("DVoRA", targets="all-linear"), name="experts")
    second = weft.attach(model, config("LoRA", targets="all-linear"), name="attention")
    assert list(first.sites) == list(second.sites) and first.frozen == second.frozen
    assert selected() == before
    assert set(weft.attach(model, weft.Full(), name="lm_head").selected) == set(before[-1])


@EACH
@torch.no_grad()  # T5 itself gives other bits when its weights have no gradient
def test_an_adapter_runs_merges_and_comes_off(name):
    want = ARCHITECTURES[name]
    model, given = want.build(), want.inputs()
    before, keys = output(model, given), list(model.state_dict())
    adapter = weft.attach(model, config("DoRA", targets="all-linear"))
    assert same_bits(output(model, given), before)
    move(adapter)
    assert distance(output(model, given), before) > 1e-2
    weft.merge(model, verify=given)
    weft.unmerge(model)
    weft.detach(model)
    assert same_bits(output(model, given), before) and list(model.state_dict()) == keys


@EACH
def test_rows_of_four_methods_and_the_base(name):
    want = ARCHITECTURES[name]
    model, given = (
        want.build().double(),
        want.inputs(rows=5),
    )  # float64, since deep models blow a rounding up
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    names = ["LoRA", "DVoRA", "DoRA", "VeRA"]
    for i, method in enumerate(names):
        move(weft.attach(model, config(method, r=2 + i, targets="all-linear"), name=method))
    asked = ["DoRA", None, *names[:2], "VeRA"]
    with torch.no_grad():
        with weft.use(model, asked):
            mixed = output(model, given)
        for i, which in enumerate(asked):
            with weft.use(model, which):
                check_close(
                    mixed[i],
                    output(model, {k: v[i : i + 1] for k, v in given.items()})[0],
                    torch.float64,
                    which,
                )


@EACH
def test_gradient_checkpointing_of_transformers_gives_the_same_gradients(name):
    want = ARCHITECTURES[name]
    model, given = want.build(), want.inputs()
    adapter = weft.attach(model, config("DVoRA", targets="all-linear"))
    move(adapter)
    model.train()
    gradients = []
    # The name of old is deprecated in transformers 5.24.
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    for enabled in (False, True):
        if enabled:
            enable({"use_reentrant": False})
            assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        model.zero_grad()
        output(model, given).pow(2).mean().backward()
        gradients.append({k: p.grad.clone() for k, p in adapter.named_parameters()})
    for key, wanted in gradients[0].items():
        assert wanted.abs().max() > 0 or want.decoder, key
        check_close(gradients[1][key], wanted, torch.float32, key)


@EACH
def test_the_plan_names_what_stays_frozen_and_fits_80_columns(name):
    want = ARCHITECTURES[name]
    adapter = weft.attach(want.build(), config("DVoRA", targets="all-linear"))
    text = str(adapter.plan())
    assert max(map(len, text.splitlines())) <= 80
    one_line = " ".join(text.split())
    for what, why in want.frozen:
        assert re.search(re.escape(what) + r" \([^)]*\): [^:]*" + re.escape(why), one_line), (
            what,
            why,
        )
    listed = {f.name for f in adapter.frozen}
    for tensor, p in adapter.model.named_parameters():
        layer = tensor.rpartition(".")[0]
        if ".weft." not in tensor and p.ndim > 1 and min(p.shape[-2:]) > 1:
            assert layer in adapter.sites or layer in listed or tensor in listed, (
                f"{tensor} is in no list"
            )


@EACH
def test_the_head_is_found_unless_it_is_tied(name):
    want = ARCHITECTURES[name]
    model = want.build()
    if not want.head:
        with pytest.raises(weft.TargetError, match="a head tied to the embedding is not one"):
            weft.attach(model, weft.Head())
        return
    wanted = {n for n, _ in model.named_parameters() if n.rpartition(".")[0] in want.head}
    adapter = weft.attach(model, weft.Head())
    assert set(adapter.selected) == wanted
    assert adapter.num_head_parameters == adapter.num_parameters


@EACH
def test_full_and_bitfit_select_every_tensor_and_every_bias(name):
    want = ARCHITECTURES[name]
    model = want.build()
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert weft.attach(model, weft.Full(), name="full").num_parameters == sum(sizes.values())
    if not want.biases:
        with pytest.raises(
            weft.TargetError, match=r"BitFit selects none of the .* it has no bias vectors"
        ):
            weft.attach(model, weft.BitFit())
        return
    adapter = weft.attach(model, weft.BitFit())
    heads = tuple(f"{h}." for h in want.head)
    wanted = {n for n in sizes if n.endswith("bias") and not n.startswith(heads or ("?",))}
    assert set(adapter.selected) == wanted


@EACH
def test_a_tied_pair_is_refused_on_either_side_with_the_way_out(name):
    want = ARCHITECTURES[name]
    model = want.build()
    head, embedding = (
        model.get_output_embeddings(),
        model.get_input_embeddings() if not want.vision else None,
    )
    if head is None or head.weight is not embedding.weight:
        return
    names = {id(m): n for n, m in model.named_modules()}
    for one in (names[id(head)], names[id(embedding)]):
        with pytest.raises(
            weft.TargetError,
            match=r"are tied: they read one weight.*tie_word_embeddings = F|computes",
        ):
            weft.attach(model, weft.LoRA(r=2, targets=[one]))
        with pytest.raises(
            weft.TargetError, match=r"is tied to .* Name both, or give one its own copy"
        ):
            weft.attach(model, weft.LoRA(r=2, targets="mlp", modules_to_save=[one]))
    assert not weft.adapters(model) and all(p.requires_grad for p in model.parameters())
