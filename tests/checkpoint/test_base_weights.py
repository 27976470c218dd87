"""An adapter is refused on a base with the same shapes and other weights, and not on one that was only
cast or quantised.
"""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoint_support import attached, llama, logits, read, refused, tiny, untied_gpt2
from safetensors.torch import save_file

import weft
from support import awake, net, same_bits
from weft.checkpoint.fingerprint import few_values
from weft.cli import main
from weft.methods import METHODS
from weft.tasks.models import EMBEDDED

NF4 = torch.tensor(
    [
        -1.0,
        -0.6962,
        -0.5251,
        -0.3949,
        -0.2844,
        -0.1848,
        -0.0911,
        0.0,
        0.0796,
        0.1609,
        0.2461,
        0.3379,
        0.4407,
        0.5626,
        0.723,
        1.0,
    ]
)
OTHER = "the base has other weights"


def nf4(W, block=64):
    """As bitsandbytes: blocks of the flattened weight, each scaled by its largest number."""
    flat = W.reshape(-1)
    rest = -len(flat) % block
    blocks = torch.cat([flat, flat.new_zeros(rest)]).view(-1, block)
    largest = blocks.abs().amax(1, keepdim=True)
    level = ((blocks / largest)[..., None] - NF4).abs().argmin(-1)
    return (NF4[level] * largest).reshape(-1)[: len(flat)].view_as(W)


def int8_rows(W):
    """As LLM.int8()."""
    step = W.abs().amax(1, keepdim=True) / 127
    return (W / step).round() * step


def float8(W):
    return W.to(torch.float8_e4m3fn).to(W.dtype)


def noise(share):
    def add(W):
        return W + share * W.std() * torch.randn(W.shape)

    return add


def changed(model, change, only=""):
    """A copy with other linear weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embed" not in name and "wte" not in name and only in name:
                p.copy_(change(p.float()))
    return model


def loads(base, folder):
    return weft.load(copy.deepcopy(base), folder).load_report


BASES = {
    "llama": llama,
    "gpt2": untied_gpt2,
    "bert": lambda: tiny("BertForSequenceClassification", "BertConfig", num_labels=3),
}
CASTS = {
    "bfloat16": lambda m: copy.deepcopy(m).bfloat16(),
    "float16": lambda m: copy.deepcopy(m).half(),
    "float64": lambda m: copy.deepcopy(m).double(),
    "twice": lambda m: copy.deepcopy(m).half().bfloat16().float(),
}
QUANTISED = {
    "nf4": lambda m: changed(m, nf4),
    "nf4 in bfloat16": lambda m: changed(m, nf4).bfloat16(),
    "int8": lambda m: changed(m, int8_rows),
    "int8 in bfloat16": lambda m: changed(m, int8_rows).bfloat16(),
    "float8": lambda m: changed(m, float8),
}


@pytest.mark.parametrize("base", BASES)
def test_a_base_that_was_cast_or_quantised_is_the_same_base_both_ways(base, tmp_path):
    model = BASES[base]()
    attached(mine := copy.deepcopy(model), weft.LoRA(r=2))
    weft.save(mine, tmp_path / "here")
    for name, change in {**CASTS, **QUANTISED}.items():
        other = change(model)
        notes = [loads(other, tmp_path / "here").notes]
        attached(other, weft.LoRA(r=2))
        weft.save(other, tmp_path / "there")
        notes.append(loads(model, tmp_path / "there").notes)
        for found in notes:
            assert bool(found) == (name in QUANTISED), name
            assert not found or "as quantised weights do" in found[0]


@pytest.mark.parametrize("base", BASES)
def test_a_base_with_other_weights_is_refused(base, tmp_path):
    model = BASES[base]()
    attached(mine := copy.deepcopy(model), weft.LoRA(r=2))
    weft.save(mine, tmp_path)
    for name, change in {
        "another model": lambda W: W.std() * torch.randn(W.shape),
        "another model, quantised": lambda W: nf4(torch.randn(W.shape)),
        "rows in another order": lambda W: W.flip(0),
        "fine-tuned": noise(0.01),
        "fine-tuned a little": noise(0.003),
        "scaled": lambda W: 1.05 * W,
    }.items():
        other = changed(model, change)
        message = refused(other, tmp_path, OTHER, ".weight'", "other_base=True", "--other-base")
        assert ("fine-tuned copy" in message) == (name == "scaled" or "tuned" in name)
        report = weft.load(other, tmp_path, other_base=True).load_report
        assert report.ok and OTHER in report.notes[0]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_leaves_a_part_of_the_base_refuses_another(method, tmp_path):
    a = awake(method)
    weft.save(a.model, tmp_path)
    other = net(variant=method, seed=1)
    if method == "Full":  # the file has all of the model
        assert weft.load(other, tmp_path).load_report.ok
        return
    refused(other, tmp_path, OTHER)
    report = weft.load(other, tmp_path, strict=False)
    assert len(report.problems) == 1 and OTHER in report.problems[0]
    weft.detach(other)
    assert same_bits(weft.load(a.model, tmp_path, name="again").model(a.x), a.run())


def test_one_other_layer_is_enough(tmp_path):
    """A pooler that is in no checkpoint is drawn again in every process."""
    model = BASES["bert"]()
    attached(model, weft.LoRA(r=2, targets=["query"], modules_to_save=["classifier"]))
    weft.save(model, tmp_path)
    weft.detach(model)
    weft.load(changed(model, noise(1.0), only="classifier"), tmp_path)  # the file has it
    refused(changed(model, noise(1.0), only="pooler"), tmp_path, "'bert.pooler.dense.weight'")


def test_a_base_with_an_adapter_merged_into_it_is_another(tmp_path):
    model = llama()
    before = logits(model)
    attached(model, weft.LoRA(r=2), name="a")
    weft.save(model, tmp_path / "a", name="a")
    weft.merge(model, "a")
    weft.save(model, tmp_path / "merged", name="a")  # the base is what it was before the merge
    weft.detach(model, "a", keep_merged=True)
    refused(model, tmp_path / "a", OTHER)
    refused(model, tmp_path / "merged", OTHER)
    attached(model, weft.LoRA(r=2), name="b")
    weft.save(model, tmp_path / "b", name="b")
    refused(llama(), tmp_path / "b", OTHER)
    plain = llama()
    for folder in ("a", "merged"):
        weft.load(plain, tmp_path / folder, name=folder)
    with weft.use(plain, None):
        assert torch.equal(logits(plain), before)


def test_while_an_adapter_is_merged_another_fits_as_before(tmp_path):
    a = awake("LoRA")
    weft.save(a.model, tmp_path)
    weft.merge(a.model)
    with pytest.raises(weft.MergeError, match="'default' is merged"):
        weft.load(a.model, tmp_path, name="b")


def test_new_rows_of_a_resized_embedding_are_not_compared(tmp_path):
    model = llama()
    attached(model, weft.LoRA(r=2))
    weft.save(model, tmp_path)
    for rows in (70, 50):
        other = llama()
        other.resize_token_embeddings(rows, mean_resizing=False)
        assert not loads(other, tmp_path).notes


def test_the_fingerprint_is_small_and_its_size_is_known_without_values(tmp_path):
    model = llama(8)
    adapter = weft.attach(model, weft.LoRA(r=2))
    weft.save(model, tmp_path)
    assert len(read(tmp_path)[1]["weft_base"]) < 1500
    with torch.device("meta"):
        empty = llama(8)
    assert weft.attach(empty, weft.LoRA(r=2)).nbytes == adapter.nbytes
    assert (tmp_path / "adapter_model.safetensors").stat().st_size == adapter.nbytes


def test_a_file_without_fingerprint_loads_and_one_that_lost_it_does_not(tmp_path, monkeypatch):
    a = awake("LoRA")
    with monkeypatch.context() as patch:
        patch.setattr("weft.checkpoint.from_adapter.fingerprint_of", lambda *_: None)
        weft.save(a.model, tmp_path / "old")
    assert weft.load(net(seed=1), tmp_path / "old").load_report.ok
    assert "known by numbers" not in str(weft.inspect(tmp_path / "old"))
    weft.save(a.model, tmp_path / "new")
    tensors, head = read(tmp_path / "new")
    for damaged in (
        {k: v for k, v in head.items() if k != "weft_base"},
        {**head, "weft_base": head["weft_base"].replace(head["weft_base"][5], "A", 1)},
        {
            **head,
            "weft_base": read(weft.save(awake("LoRA", model=net(seed=1)).model, tmp_path / "b"))[1][
                "weft_base"
            ][:-1],
        },
    ):
        save_file(tensors, tmp_path / "new" / "adapter_model.safetensors", metadata=damaged)
        refused(net(), tmp_path / "new", "its Weft header is damaged")


def test_the_fingerprint_goes_along_with_an_export(tmp_path):
    for method, to in (("LoRA", "peft"), ("LoRAFA", "lora"), ("VeRA", "peft")):
        a = awake(method)
        weft.save(a.model, tmp_path / method)
        weft.export(tmp_path / method, to, tmp_path / f"{method}-out")
        weft.load(net(), tmp_path / f"{method}-out")
        refused(net(seed=1), tmp_path / f"{method}-out", OTHER)
        assert "known by numbers of" in str(weft.inspect(tmp_path / f"{method}-out"))


def test_peft_still_reads_the_file(tmp_path):
    from checkpoint_support import peft_reads

    model = llama()
    attached(model, weft.LoRA(r=2))
    wanted = logits(model)
    weft.save(model, tmp_path)
    torch.testing.assert_close(logits(peft_reads(llama(), tmp_path)), wanted, rtol=1e-4, atol=1e-5)


def test_the_commands_refuse_another_base_and_have_the_switch(tmp_path, capsys):
    import transformers

    from weft.inference.opened import load_model
    from weft.inference.pretrained import find_source

    model = transformers.AutoModelForImageClassification.from_pretrained(EMBEDDED["digits-vit"])
    attached(model, weft.LoRA(r=2)).save(tmp_path / "a")
    weft.detach(model)
    other = changed(model, noise(0.2))
    other.save_pretrained(tmp_path / "other")
    words = ["--model", str(tmp_path / "other"), "--adapter", str(tmp_path / "a")]
    assert main(["merge", *words, "--out", str(tmp_path / "m")]) == 1
    assert OTHER in capsys.readouterr().err and not (tmp_path / "m").exists()
    assert main(["merge", *words, "--out", str(tmp_path / "m"), "--other-base"]) == 0
    assert "note:" in capsys.readouterr().out
    ref = find_source(str(tmp_path / "other"))  # what generate, eval and judge call
    with pytest.raises(weft.CheckpointError, match=OTHER):
        load_model(ref, str(tmp_path / "a"), "auto", "cpu")
    loaded, notes = load_model(ref, str(tmp_path / "a"), "auto", "cpu", True)
    assert weft.adapters(loaded) and any("used all the same" in note for note in notes)
    with pytest.raises(weft.ConfigError, match="--other-base does nothing without --adapter"):
        load_model(ref, None, "auto", "cpu", True)


def test_only_quantised_weights_have_few_values():
    torch.manual_seed(0)
    for shape in ((300, 200), (24, 24), (7, 130)):
        W = torch.randn(shape)
        for plain in (W, W.bfloat16(), W.half(), W * (torch.rand(shape) > 0.5), torch.ones(shape)):
            assert not few_values(plain)
        for quantised in (nf4(W), int8_rows(W), float8(W), nf4(W).bfloat16(), int8_rows(W).half()):
            assert few_values(quantised)


def test_a_damaged_fingerprint_is_an_error_of_the_file():
    from weft.checkpoint.fingerprint import Fingerprint, fingerprint_of

    found = fingerprint_of(awake("LoRA").adapter)
    text, entries = found.text(), found.manifest()
    again = Fingerprint.parse(entries, text)
    assert same_bits(again.values, found.values) and again.sampled == found.sampled
    for damaged in (
        entries[:-1],
        [*entries, entries[0]],
        [[7, *entries[0][1:]], *entries[1:]],
        [[entries[0][0], [2**40, 7], entries[0][2]], *entries[1:]],
        [[entries[0][0], [], entries[0][2]], *entries[1:]],
        [[entries[0][0], entries[0][1], -1], *entries[1:]],
    ):
        with pytest.raises(ValueError, match="fingerprint of the base"):
            Fingerprint.parse(damaged, text)
    with pytest.raises(ValueError, match="not the one that was saved"):
        Fingerprint.parse(entries, text[:-1] + "x")
