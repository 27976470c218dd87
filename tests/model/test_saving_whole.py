"""`save_pretrained` of a model with an adapter writes what loads as the base: it says so at that moment."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import weft
from support import move


def llama():
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=44,
            num_hidden_layers=1,
            num_attention_heads=3,
        )
    ).eval()


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = llama()
    move(weft.attach(made, weft.LoRA(r=2), name="pets"))
    return made


def test_it_warns_every_time_and_names_both_cures(model, tmp_path):
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"without adapter 'pets'.*weft\.save.*weft\.merge"
        ) as seen:
            model.save_pretrained(tmp_path)
        assert seen[0].filename == __file__
    assert (tmp_path / "model.safetensors").is_file()


def test_so_do_models_around_and_within_the_one_that_was_given_to_attach(model, tmp_path):
    with pytest.warns(UserWarning, match="without adapter 'pets'"):
        model.model.save_pretrained(tmp_path)
    outer = nn.Sequential(llama())
    weft.attach(outer, weft.LoRA(r=2), name="mine")
    with pytest.warns(UserWarning, match="without adapter 'mine'"):
        outer[0].save_pretrained(tmp_path)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        with pytest.warns(UserWarning, match="without adapter 'pets'"):
            other.save_pretrained(tmp_path)


def test_a_copy_writes_its_own_weights(model, tmp_path):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.fill_(7.0)
    with pytest.warns(UserWarning, match="'pets'"):
        other.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert (load_file(tmp_path / "model.safetensors")["model.norm.weight"] == 7).all()


def test_a_merged_model_says_to_detach_first(model, tmp_path):
    import transformers

    x = torch.randint(3, 61, (2, 7))
    wanted = model(x).logits
    weft.merge(model, "pets")
    with pytest.warns(UserWarning, match=r"merged into them.*keep_merged=True"):
        model.save_pretrained(tmp_path / "a")
    weft.detach(model, "pets", keep_merged=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "b")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "b")
    torch.testing.assert_close(again(x).logits, wanted)


def test_after_detach_nothing_is_left(model, tmp_path):
    weft.attach(model, weft.LoRA(r=2), name="b")
    weft.detach(model, "pets")
    with pytest.warns(UserWarning, match="without adapter 'b'"):
        model.save_pretrained(tmp_path)
    weft.detach(model, "b")
    assert "save_pretrained" not in vars(model) and "save_pretrained" not in vars(model.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
