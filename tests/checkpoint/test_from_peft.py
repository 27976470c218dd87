"""What peft saves, `weft.load` reads and gives the same logits; what cannot be carried raises and
names the field.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoint_support import (
    CLASSIFIERS,
    GPT2,
    TENSORS,
    classifier,
    close,
    config_of,
    edit_config,
    llama,
    logits,
    peft_of,
    peft_reads,
    peft_saves,
    quiet,
    read,
    refused,
    rewrite,
    tiny,
    untied_gpt2,
    wake,
)
from peft import LoraConfig, VeraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

import weft
from support import inputs, net

ON_NET = {"target_modules": ["layer", "mid"]}


def lora(**changes: Any) -> LoraConfig:
    with quiet():
        return LoraConfig(**{"r": 3, "lora_alpha": 5, **changes})


def vera(**changes: Any) -> VeraConfig:
    with quiet():
        return VeraConfig(**{"r": 3, "d_initial": 0.3, **changes})


def same_logits(
    build: Callable[[], Any], config: Any, folder: Path, x: Tensor | None = None
) -> Any:
    """Train under peft, save, let Weft read it, and compare; then the same through Weft's own file,
    and back in peft.
    """
    theirs = peft_of(build(), config)
    peft_saves(theirs, folder / "peft")
    mine = build().eval()
    adapter = weft.load(mine, folder / "peft")
    close(logits(mine, x), logits(theirs, x), logits(build(), x))
    assert all(not p.is_meta for p in adapter.parameters())
    weft.save(mine, folder / "weft")
    again = build().eval()
    weft.load(again, folder / "weft")
    assert torch.equal(logits(again, x), logits(mine, x))
    is_vera = isinstance(config, VeraConfig)
    weft.save(mine, folder / "back", projections=is_vera)
    back = peft_reads(build(), folder / "back", "fan_in_fan_out is set to")
    close(logits(back, x), logits(theirs, x), logits(build(), x))
    return adapter


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"use_dora": True, "use_rslora": True},
        {"lora_dropout": 0.25},
        {"rank_pattern": {"layer": 2}},
        {"rank_pattern": {"^mid": 5}, "alpha_pattern": {"layer": 7, "mi.": 2}},
        {"rank_pattern": {"lay.*": 2, "layer": 6}, "use_dora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal", "r": 4},
        {"init_lora_weights": False},
    ],
    ids=str,
)
def test_lora_and_dora(kind, changes, tmp_path):
    if kind == "embedding" and changes.get("init_lora_weights") == "orthogonal":
        pytest.skip("peft has no orthogonal start for an embedding")
    adapter = same_logits(lambda: net(kind), lora(**ON_NET, **changes), tmp_path, inputs(kind))
    assert type(adapter.config) is (weft.DoRA if changes.get("use_dora") else weft.LoRA)
    assert adapter.config.alpha == 5


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"save_projection": False},
        {"projection_prng_key": 9},
        {"projection_prng_key": 9, "save_projection": False},
        {"vera_dropout": 0.25},
    ],
    ids=str,
)
def test_vera(kind, changes, tmp_path):
    """Without stored matrices, those that peft drew from its key are drawn again, for layers that
    are not square.
    """
    adapter = same_logits(lambda: net(kind), vera(**ON_NET, **changes), tmp_path, inputs(kind))
    stored = changes.get("save_projection", True)
    assert adapter.config.draw == ("stored" if stored else "peft")
    assert ("base_model.vera_A" in read(tmp_path / "weft")[0]) == stored
    assert "base_model.vera_A" in read(tmp_path / "back")[0]


@pytest.mark.parametrize("r", [1, 13])
@pytest.mark.parametrize("save", [True, False])
def test_vera_matrices_are_the_very_bits_of_peft(r, save, tmp_path):
    theirs = peft_of(net(), vera(r=r, projection_prng_key=4, save_projection=save, **ON_NET))
    mine = weft.load(net(), peft_saves(theirs, tmp_path))
    shared = mine.sites["mid"].shared
    assert torch.equal(shared.A, theirs.base_model.vera_A["default"])
    assert torch.equal(shared.B, theirs.base_model.vera_B["default"])


def made(spec: dict[str, Any]) -> Any:
    """LoRA's configuration, or VeRA's where the specification says so."""
    known = {k: v for k, v in spec.items() if k != "vera"}
    return vera(**known) if spec.get("vera") else lora(**known)


@pytest.mark.parametrize(
    "spec",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["c_attn"]},
        {"target_modules": ["c_proj"], "use_dora": True},
        {"target_modules": r".*h\.1\..*(c_attn|c_fc)"},
        {"target_modules": ["c_attn"], "layers_to_transform": [1]},
        {"target_modules": ["c_attn"], "layers_to_transform": 1, "layers_pattern": "h"},
        {"target_modules": "all-linear", "exclude_modules": ["c_proj"]},
        {"vera": True, "target_modules": "all-linear"},
        {"vera": True, "target_modules": ["c_attn", "c_proj"], "save_projection": False},
        {
            "vera": True,
            "target_modules": ["c_attn"],
            "layers_to_transform": [0],
            "save_projection": False,
        },
        {"target_modules": ["wte", "c_attn"]},
        {"target_modules": ["wte", "lm_head", "c_fc"], "use_dora": True},
    ],
    ids=str,
)
def test_gpt2(spec, tmp_path):
    """Conv1D, square and not; embeddings; every way to say which modules."""
    build = (
        untied_gpt2
        if "wte" in spec["target_modules"]
        else lambda: tiny("GPT2LMHeadModel", "GPT2Config", **GPT2)
    )
    same_logits(build, made(spec), tmp_path)


@pytest.mark.parametrize(
    "spec",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"target_modules": r"model\.layers\.\d+\.self_attn\.[qv]_proj", "use_dora": True},
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 5},
            "alpha_pattern": {r"layers\.0\..*q_proj": 8},
        },
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["embed_tokens"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"vera": True, "target_modules": "all-linear"},
        {
            "vera": True,
            "target_modules": ["gate_proj", "down_proj"],
            "save_projection": False,
            "modules_to_save": ["norm"],
        },
    ],
    ids=str,
)
def test_llama(spec, tmp_path):
    same_logits(lambda: llama(attention_bias=True, num_key_value_heads=1), made(spec), tmp_path)


@pytest.mark.parametrize("which", CLASSIFIERS)
@pytest.mark.parametrize("make", [lora, vera], ids=["lora", "vera"])
def test_a_classifier(which, make, tmp_path):
    """task_type SEQ_CLS lists "classifier" and "score", of which a model has one; all of its
    tensors are in the file.
    """
    targets = ["query", "dense"] if which == "bert" else CLASSIFIERS[which][2]
    adapter = same_logits(
        lambda: classifier(which), make(target_modules=targets, task_type="SEQ_CLS"), tmp_path
    )
    assert config_of(tmp_path / "peft")["modules_to_save"] == ["classifier", "score"]
    head = "score" if which == "llama" else "classifier"
    saved = ("classifier", "pre_classifier") if which == "distilbert" else (head,)
    assert sorted(adapter.config.modules_to_save) == sorted(saved)
    mine = weft.load(classifier(which), tmp_path / "peft").load_report
    assert ["modules_to_save names" in note for note in mine.notes] == [True]


def test_a_classifier_without_its_head_is_refused(tmp_path):
    theirs = peft_of(classifier("roberta"), lora(target_modules=["query"], task_type="SEQ_CLS"))
    peft_saves(theirs, tmp_path)
    rewrite(tmp_path, lambda t: [t.pop(k) for k in list(t) if "classifier" in k])
    refused(classifier("roberta"), tmp_path, "no 'classifier.dense.weight'")


def test_an_adapter_of_another_name_and_a_second_adapter(tmp_path):
    theirs = peft_of(net(), lora(**ON_NET), name="first")
    with quiet():
        theirs.add_adapter("second", lora(r=2, use_dora=True, **ON_NET))
        theirs.set_adapter("second")
    wake(theirs, 8)
    x = inputs("linear")
    with quiet():
        theirs.save_pretrained(str(tmp_path))
    model = net()
    for name in ("first", "second"):
        weft.load(model, tmp_path / name, name=name)
        theirs.set_adapter(name)
        close(logits(model, x), logits(theirs, x), logits(net(), x))


def test_a_state_dict_taken_by_hand_has_the_adapters_name_in_it(tmp_path):
    theirs = peft_of(net(), lora(use_dora=True, **ON_NET))
    peft_saves(theirs, tmp_path)
    raw = {k: v.contiguous() for k, v in theirs.state_dict().items() if "lora_" in k}
    assert any(".default" in k for k in raw)
    save_file(raw, str(tmp_path / TENSORS))
    mine = net()
    weft.load(mine, tmp_path)
    close(
        logits(mine, inputs("linear")),
        logits(theirs, inputs("linear")),
        logits(net(), inputs("linear")),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spec", [{}, {"use_dora": True}, {"vera": True}], ids=str)
def test_other_dtypes(spec, dtype, tmp_path):
    """Numbers that peft held in another dtype arrive unrounded."""
    theirs = net(dtype=torch.float32).to(dtype)
    with quiet():
        theirs = peft.get_peft_model(theirs, made({**spec, **ON_NET}), autocast_adapter_dtype=False)
    wake(theirs)
    peft_saves(theirs, tmp_path)
    mine = weft.load(net(dtype=torch.float32).to(dtype), tmp_path)
    held = {k.removeprefix("base_model.model."): v for k, v in read(tmp_path)[0].items()}
    assert {v.dtype for k, v in held.items() if "vera_A" not in k and "vera_B" not in k} == {dtype}
    for name, p in mine.named_parameters():
        module, _, tensor = name.rpartition(".")
        key = next(
            k
            for k in held
            if k.startswith(module)
            and k.removesuffix(".weight").endswith(
                {"A": "lora_A", "B": "lora_B", "m": "vector", "d": "lambda_d", "b": "lambda_b"}[
                    tensor
                ]
            )
        )
        assert torch.equal(p.double(), held[key].double()), name


def test_an_embedding_is_compared_with_the_copy_that_the_file_repeats(tmp_path):
    theirs = peft_of(llama(), lora(target_modules=["embed_tokens"]))
    peft_saves(theirs, tmp_path)
    repeated = "base_model.model.model.embed_tokens.base_layer.weight"
    assert repeated in read(tmp_path)[0]
    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[3, 3] += 1e-3
    refused(other, tmp_path, "'model.embed_tokens.weight'", "repeats this tensor of its base")
    assert weft.load(llama().bfloat16(), tmp_path).sites  # the same base, in a coarser dtype
    peft_saves(
        peft_of(llama().bfloat16(), lora(target_modules=["embed_tokens"])), tmp_path / "coarse"
    )
    assert weft.load(llama(), tmp_path / "coarse").sites  # and the other way round
    refused(
        llama(vocab_size=62),
        tmp_path,
        "[3, 61] in the file, [3, 62] expected",
        "repeats this tensor of its base",
    )


def test_a_resized_vocabulary_is_refused(tmp_path):
    """peft then writes the whole embedding, changed or not, and no field of its configuration says
    so.
    """
    theirs = peft_of(llama(), lora(target_modules=["q_proj"]))
    with quiet():
        theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    refused(llama(), tmp_path, "extra", "'model.embed_tokens.weight'")


@pytest.mark.parametrize(
    "targets", [["attention"], ["mlp", "all"], "mlp", ["a-b"], "(mlp|a-b)"], ids=str
)
def test_names_that_mean_something_else_in_weft(targets, tmp_path):
    """In peft a list holds name endings and a text is an expression, whatever the words."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {name: nn.Linear(7, 7) for name in ("attention", "mlp", "all", "a-b", "other")}
        )
        model["deep"] = nn.ModuleDict({"mlp": nn.Linear(7, 7)})
        layers = [*list(model.values())[:5], model["deep"]["mlp"]]
        model.forward = lambda x: sum(torch.tanh(layer(x)) for layer in layers)
        return model

    theirs = peft_of(build(), lora(target_modules=targets))
    adapted = {
        n.removeprefix("base_model.model.")
        for n, m in theirs.named_modules()
        if hasattr(m, "lora_A")
    }
    mine = weft.load(build(), peft_saves(theirs, tmp_path))
    assert set(mine.sites) == adapted
    fresh = weft.attach(build(), mine.config)  # and the configuration means the same in Weft
    assert set(fresh.sites) == adapted


# Fields that change the adapter and have no counterpart here, each as peft really writes it


LLAMA = {"target_modules": ["q_proj", "v_proj"]}


def wide() -> Any:
    return llama(attention_bias=True)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "mica"}, "init_lora_weights='mica'"),
        ({"use_qalora": True, "qalora_group_size": 4}, "use_qalora=True"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication=[[0, 2], [1, 2]]"),
        ({"alora_invocation_tokens": [4, 7]}, "alora_invocation_tokens=[4, 7]"),
        ({"kasa_config": {}}, "kasa_config={"),
        ({"velora_config": {}}, "velora_config={"),
        ({"monteclora_config": {}}, "monteclora_config={"),
        (
            {
                "use_bdlora": {
                    "target_modules_bd_a": ["q_proj"],
                    "target_modules_bd_b": ["v_proj"],
                    "nblocks": 3,
                }
            },
            "use_bdlora={",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_field_of_lora_that_cannot_be_carried(changes, field, tmp_path):
    theirs = peft_of(wide(), lora(**{**LLAMA, **changes}))
    peft_saves(theirs, tmp_path)
    with torch.no_grad():
        theirs(torch.tensor([[3, 4, 7]]))  # peft itself runs it
    refused(wide(), tmp_path, field, "cannot carry", error=weft.UnsupportedError)


@pytest.mark.parametrize("bias", ["all", "vera_only"])
def test_a_field_of_vera_that_cannot_be_carried(bias, tmp_path):
    theirs = peft_of(wide(), vera(bias=bias, **LLAMA))
    peft_saves(theirs, tmp_path)
    refused(wide(), tmp_path, f"bias={bias!r}", error=weft.UnsupportedError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("megatron_config", {"a": 1}),
        ("corda_config", {"a": 1}),
        ("lora_ga_config", {"a": 1}),
        ("arrow_config", {"a": 1}),
        ("loftq_config", {"loftq_bits": 4}),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("a_field_of_a_later_version", 3),
    ],
)
def test_a_field_that_peft_writes_only_with_other_software_or_later(field, value, tmp_path):
    peft_saves(peft_of(net(), lora(**ON_NET)), tmp_path)
    edit_config(tmp_path, **{field: value})
    refused(net(), tmp_path, f"{field}={value!r}", error=weft.UnsupportedError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("a_field_of_a_later_version", None),
        ("another", False),
        ("runtime_config", {}),
        ("ensure_weight_tying", True),
        ("revision", "main"),
        ("inference_mode", False),
        ("task_type", "CAUSAL_LM"),
        ("megatron_core", "megatron.core"),
    ],
)
def test_a_field_that_changes_no_number_is_carried(field, value, tmp_path):
    theirs = peft_of(net(), lora(**ON_NET))
    peft_saves(theirs, tmp_path)
    edit_config(tmp_path, **{field: value})
    mine = net()
    weft.load(mine, tmp_path)
    close(
        logits(mine, inputs("linear")),
        logits(theirs, inputs("linear")),
        logits(net(), inputs("linear")),
    )


def test_eva_is_a_start_like_any_other(tmp_path):
    """Its configuration is written into every file, and says nothing of the finished adapter."""
    theirs = peft_of(net(), lora(init_lora_weights="eva", **ON_NET))
    assert config_of(peft_saves(theirs, tmp_path))["eva_config"]
    mine = net()
    weft.load(mine, tmp_path)
    close(
        logits(mine, inputs("linear")),
        logits(theirs, inputs("linear")),
        logits(net(), inputs("linear")),
    )


@pytest.mark.parametrize(
    "spec",
    [{"target_modules": ["wte"]}, {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}],
    ids=["adapted", "saved"],
)
def test_one_side_of_a_tied_pair_is_refused(spec, tmp_path):
    """peft trains the embedding and leaves the tied head behind; that is not what a merged model
    would say.
    """

    def build() -> Any:
        return tiny("GPT2LMHeadModel", "GPT2Config", **GPT2)

    peft_saves(peft_of(build(), made(spec)), tmp_path)
    refused(build(), tmp_path, "tied", "lm_head", error=weft.TargetError)
    weft.load(untied_gpt2(), tmp_path)
