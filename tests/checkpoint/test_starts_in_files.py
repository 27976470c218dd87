"""init="pissa" and "olora" in files: bit for bit in ours, and the same logits in peft, both ways."""

import peft
import pytest
import torch
from checkpoint_support import (
    attached,
    close,
    config_of,
    llama,
    logits,
    peft_of,
    peft_reads,
    peft_saves,
    quiet,
    untied_gpt2,
    wake,
)

import weft
from weft.errors import ConfigError
from weft.training.start import open_start

INITS = ("pissa", "olora")
CONFIGS = [
    *(weft.LoRA(r=4, alpha=6, init=init) for init in INITS),
    weft.DoRA(r=4, alpha=6, init="pissa"),
    weft.LoRA(r=4, alpha=6, init="pissa", rslora=True),
    weft.LoRA(r=4, init="olora", targets={"q_proj": {"r": 2}, "up_proj": {"alpha": 9}}),
    weft.LoRA(r=4, targets={"q_proj": {"init": "pissa"}, "up_proj": {"r": 3}}),
    weft.DoRA(r=4, init="pissa", train=["norms"]),
    weft.LoRA(r=4, init="pissa", new_tokens=[3, 7]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_file_gives_back_every_bit_and_belongs_to_the_unchanged_base(
    config, tmp_path, monkeypatch
):
    model = llama()
    adapter = attached(model, config)
    weft.save(model, tmp_path)
    again = llama()
    with monkeypatch.context() as patch:  # a start in the file is not computed again
        patch.setattr("weft.methods.starts.of_weight", lambda *_: pytest.fail("computed"))
        loaded = weft.load(again, tmp_path)
    assert loaded.config == adapter.config
    for name, layer in adapter.layers.items():
        theirs = loaded.layers[name].stored()
        assert loaded.layers[name].method == layer.method
        assert all(torch.equal(t, theirs[k]) for k, t in layer.stored().items())
    assert torch.equal(logits(again), logits(model))
    shown = weft.inspect(tmp_path)
    assert shown.numbers == adapter.num_parameters
    if config.train:
        assert not shown.readable_by_peft
        return
    theirs = peft_reads(llama(), tmp_path)
    close(logits(theirs), logits(model), logits(llama()))
    weft.export(tmp_path, "lora", tmp_path / "out") if type(config) is weft.LoRA else None
    assert config_of(tmp_path)["init_lora_weights"] in (True, "gaussian")


@pytest.mark.parametrize("build", [llama, untied_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_what_peft_saved_with_such_a_start_is_read(init, dora, build, tmp_path):
    """Converted and not, as peft itself loads it again: onto the base as it was."""
    if init == "olora" and build is untied_gpt2:
        pytest.skip("peft's olora fails on a Conv1D that is not square")
    targets = ["q_proj", "down_proj"] if build is llama else ["c_attn", "c_fc"]
    with quiet():
        made = peft.LoraConfig(
            r=3, lora_alpha=5, init_lora_weights=init, target_modules=targets, use_dora=dora
        )
        base = build().eval()
        theirs = peft.get_peft_model(base, made).eval()
    wake(theirs)
    wanted = logits(theirs)
    with quiet("init_lora_weights"):
        theirs.save_pretrained(str(tmp_path))
    mine = build().eval()
    adapter = weft.load(mine, tmp_path)
    assert adapter.config.init == init
    close(logits(mine), wanted, logits(build()))
    weft.save(mine, tmp_path / "mine")
    back = build().eval()
    weft.load(back, tmp_path / "mine")
    assert torch.equal(logits(back), logits(mine))
    with pytest.raises(weft.UnsupportedError, match="starts at a part of the base's weights"):
        weft.export(tmp_path, "lora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_embedding_in_such_a_file_of_peft_starts_as_usual(tmp_path):
    with quiet():
        made = peft.LoraConfig(r=3, init_lora_weights="pissa", target_modules=["wte", "c_fc"])
        theirs = peft.get_peft_model(untied_gpt2().eval(), made).eval()
    wake(theirs)
    with quiet("init_lora_weights"):
        theirs.save_pretrained(str(tmp_path))
    mine = untied_gpt2().eval()
    weft.load(mine, tmp_path)
    close(logits(mine), logits(theirs), logits(untied_gpt2()))


def test_peft_s_olora_of_conv1d_is_refused(tmp_path):
    """It decomposes Wᵀ as if it were W; where it is square that goes unnoticed, and peft's own output
    at the start is not the base's.
    """
    with quiet():
        made = peft.LoraConfig(r=3, init_lora_weights="olora", target_modules=["attn.c_proj"])
        theirs = peft.get_peft_model(untied_gpt2().eval(), made).eval()
    assert (logits(theirs) - logits(untied_gpt2())).abs().max() > 1e-2
    with quiet("init_lora_weights"):
        theirs.save_pretrained(str(tmp_path))
    with pytest.raises(weft.UnsupportedError, match="with fan_in_fan_out"):
        weft.load(untied_gpt2(), tmp_path)


def test_other_rewriting_starts_are_still_refused(tmp_path):
    theirs = peft_of(llama(), peft.LoraConfig(r=3, init_lora_weights="pissa_niter_4"))
    with quiet("init_lora_weights"):
        peft_saves(theirs, tmp_path)
    with pytest.raises(weft.UnsupportedError, match="init_lora_weights='pissa_niter_4'"):
        weft.load(llama(), tmp_path)


def test_a_run_does_not_begin_with_tensors_of_another_meaning(tmp_path):
    for name, init in (("a", "pissa"), ("b", "kaiming")):
        model = llama()
        attached(model, weft.LoRA(r=4, init=init))
        weft.save(model, tmp_path / name)
    assert open_start(str(tmp_path / "a"), weft.LoRA(r=4, init="olora"))
    for name, init in (("a", "gaussian"), ("b", "pissa")):
        with pytest.raises(ConfigError, match="tensors mean something else"):
            open_start(str(tmp_path / name), weft.LoRA(r=4, init=init))
