"""Prefix and prompt tuning through peft's files both ways: logits with either padding, generation,
and what is refused.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from checkpoint_support import (
    GPT2,
    classifier,
    close,
    config_of,
    edit_config,
    llama,
    logits,
    quiet,
    read,
    refused,
    rewrite,
    tiny,
)

import weft
from support import check_close

BASES = {
    "gpt2": lambda: tiny("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "llama": lambda: llama(3),
    "grouped": lambda: llama(3, num_key_value_heads=1),
    "opt": lambda: tiny("OPTForCausalLM", "OPTConfig", ffn_dim=44, word_embed_proj_dim=24),
}
OURS = {
    "prefix": weft.Prefix(n=4, std=0.4),
    "mlp": weft.Prefix(n=4, hidden=6),
    "prompt": weft.PreEmbed(l_p=4, std=0.4),
}
THEIRS = {
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "mlp": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=6
    ),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}
both = pytest.mark.parametrize("kind", list(OURS))
each_base = pytest.mark.parametrize("base", list(BASES))


def batches() -> list[dict[str, Any]]:
    x = torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(5))
    right, left = torch.ones(3, 7, dtype=torch.long), torch.ones(3, 7, dtype=torch.long)
    right[1, 4:], left[1, :3] = 0, 0
    return [
        {"input_ids": x, "attention_mask": mask} for mask in (torch.ones_like(right), right, left)
    ]


def agree(mine: Any, theirs: Any, base: Any) -> None:
    """The same logits at real tokens, the same loss, the same text, token by token."""
    with quiet(), torch.no_grad():
        for batch in batches():
            keep = batch["attention_mask"].bool()
            close(
                mine(**batch).logits[keep],
                theirs(**batch).logits[:, -7:][keep],
                base(**batch).logits[keep],
            )
        x = batches()[0]
        labels = x["input_ids"].masked_fill(
            torch.arange(7) < 2, -100
        )  # peft has virtual tokens predict the first one too
        check_close(mine(**x, labels=labels).loss, theirs(**x, labels=labels).loss, torch.float32)
        # Not against their `generate`: peft 0.21.2 puts the prompt in again at every step under
        # transformers 5.24, which has renamed the cache. Their forward is right.
        mine_says, so_far = (
            mine.generate(**x, max_new_tokens=4, do_sample=False, eos_token_id=None),
            x["input_ids"],
        )
        for _ in range(4):
            so_far = torch.cat([so_far, theirs(so_far).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(mine_says, so_far)


@both
@each_base
def test_what_weft_saves_peft_reads(base, kind, tmp_path):
    model = BASES[base]()
    adapter = weft.attach(model, OURS[kind])
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.4)
    weft.save(model, tmp_path)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(BASES[base](), str(tmp_path)).eval()
    agree(model, theirs, BASES[base]())
    again = BASES[base]()
    weft.load(again, tmp_path)
    assert torch.equal(logits(again), logits(model)) and weft.inspect(tmp_path).readable_by_peft
    assert list(read(tmp_path)[0]) == ["prompt_embeddings"]
    assert config_of(tmp_path)["peft_type"] == (
        "PROMPT_TUNING" if kind == "prompt" else "PREFIX_TUNING"
    )


@both
@each_base
def test_what_peft_saves_weft_reads(base, kind, tmp_path):
    with quiet():
        theirs = peft.get_peft_model(BASES[base](), THEIRS[kind]()).eval()
        with torch.no_grad():
            for p in theirs.prompt_encoder.parameters():
                p.mul_(0.5)
        theirs.save_pretrained(str(tmp_path))
    model = BASES[base]()
    adapter = weft.load(model, tmp_path)
    agree(model, theirs, BASES[base]())
    assert adapter.config == (weft.PreEmbed(l_p=4) if kind == "prompt" else weft.Prefix(n=4))
    found = weft.inspect(tmp_path)
    assert found.writer == "peft" and found.numbers == adapter.num_parameters and str(found)


@pytest.mark.parametrize(
    "config",
    [weft.PreEmbed(l_p=2, l_i=1), weft.PreLayer(l_p=2), weft.Prefix(n=2, positions="kept")],
    ids=lambda c: type(c).__name__,
)
def test_what_peft_has_no_form_for_makes_peft_refuse(config, tmp_path):
    model = BASES["gpt2"]()
    weft.attach(model, config)
    weft.save(model, tmp_path)
    assert (
        config_of(tmp_path)["peft_type"].startswith("WEFT_")
        and not weft.inspect(tmp_path).readable_by_peft
    )
    with pytest.raises((KeyError, ValueError)), quiet():
        peft.PeftModel.from_pretrained(BASES["gpt2"](), str(tmp_path))


def test_a_model_in_which_peft_does_something_else_gets_wefts_own_layout_and_refuses_pefts(
    tmp_path,
):
    with quiet():
        peft.get_peft_model(BASES["llama"](), THEIRS["prefix"]()).save_pretrained(
            str(tmp_path / "peft")
        )
    for build, why in (
        (lambda: classifier("bert"), "it is no decoder"),
        (lambda: BASES["llama"]().model, "no causal language"),
        (lambda: llama(3, "Mistral", sliding_window=4), "sliding window"),
    ):
        model = build()
        attached_layout(model, tmp_path / "own")
        refused(build(), tmp_path / "peft", why)


def attached_layout(model: Any, folder: Any) -> None:
    weft.attach(model, weft.Prefix(n=3))
    weft.save(model, folder)
    assert config_of(folder)["peft_type"] == "WEFT_PREFIX"
    weft.detach(model)
    weft.load(model, folder)


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    with quiet():
        peft.get_peft_model(BASES["llama"](), THEIRS["prefix"]()).save_pretrained(str(tmp_path))
    refused(llama(2), tmp_path, "the file has 3 layers, and the model 2")
    refused(BASES["grouped"](), tmp_path, "[24, 24] (out, in) in the file, and the model's")
    rewrite(tmp_path, lambda t: t.update(more=torch.zeros(2)))
    refused(BASES["llama"](), tmp_path, "extra: 'more'")
    rewrite(
        tmp_path,
        lambda t: (
            t.pop("more"),
            t.update(prompt_embeddings=t["prompt_embeddings"][:, :-1].contiguous()),
        ),
    )
    refused(BASES["llama"](), tmp_path, "shape [4, 143] in the file, [4, 144] expected")
    rewrite(tmp_path, lambda t: t.clear() or t.update(other=torch.zeros(3)))
    refused(BASES["llama"](), tmp_path, "missing: 'prompt_embeddings'")
    edit_config(tmp_path, task_type="SEQ_CLS")
    with pytest.raises(
        weft.UnsupportedError, match=r"task_type='SEQ_CLS'.*Weft reads that of CAUSAL_LM"
    ):
        weft.load(BASES["llama"](), tmp_path)
    edit_config(tmp_path, task_type="CAUSAL_LM", peft_type="P_TUNING")
    with pytest.raises(weft.UnsupportedError, match="peft_type='P_TUNING'; Weft reads"):
        weft.load(BASES["llama"](), tmp_path)


def test_weft_has_it_in_its_own_file_with_a_header_that_is_held_to_it(tmp_path):
    model = BASES["llama"]()
    weft.attach(model, weft.Prefix(n=3))
    weft.save(model, tmp_path)
    rewrite(tmp_path, lambda t: t["prompt_embeddings"][0, 0].add_(1))
    refused(BASES["llama"](), tmp_path, "'prompt_embeddings': checksum")
