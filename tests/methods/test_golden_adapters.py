"""Held equal to the package `adapters` through the files that scripts/golden_adapters.py has left
(see golden/README.md).

What differs by convention and is not compared: dropout, which they apply behind `up`; the small
random start of `up`; that Houlsby's paper trains the model's LayerNorms as well. Their Pfeiffer
adapter on a pre-norm model is set to read the MLP's output (original_ln_before=False). Their
parallel adapter stands beside the whole MLP (and reads the residual stream of a pre-norm model
before its norm), where no layer of ours is; our rule is run there by hooks and held equal as a
function.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import weft
from architectures import GPT2, SMALL
from support import check_close, distance, same_bits
from weft.model.structure import Structure

FOLDER = Path(__file__).resolve().parents[1] / "golden"
MODELS = {
    "bert": ("BertModel", "BertConfig"),
    "roberta": ("RobertaModel", "RobertaConfig"),
    "gpt2": ("GPT2Model", "GPT2Config"),
    "llama": ("LlamaModel", "LlamaConfig"),
}
# The layer that the MLP's adapter of a setting hangs on, of each block, where it is no output map.
NORMS = {
    "bert": "encoder.layer.{}.output.LayerNorm",
    "roberta": "encoder.layer.{}.output.LayerNorm",
}
SETTINGS = {"houlsby": {}, "pfeiffer": {}, "drop": {"skip_layers": 1}, "lin": {}}


def golden(name):
    """The model of a file with the file's weights, and the file."""
    import transformers

    file = load_file(str(FOLDER / f"adapters_{name}.safetensors"))
    model, made = MODELS[name]
    own = {"gpt2": {**GPT2, "n_layer": 2}, "llama": {"num_key_value_heads": 1}}.get(name, {})
    sizes = {**SMALL, **own, "num_hidden_layers": 2}
    built = getattr(transformers, model)(getattr(transformers, made)(**sizes)).eval()
    built.load_state_dict(
        {key.removeprefix("base/"): t for key, t in file.items() if key.startswith("base/")}
    )
    check_close(run(built, file), file["base_output"], torch.float32, "the base alone")
    return built, file


@torch.no_grad()
def run(model, file):
    return model(input_ids=file["input_ids"]).last_hidden_state


def tensors(file, setting):
    """(block, place) -> tensors of one adapter."""
    found = {}
    for key, t in file.items():
        _, _, rest = key.partition(f"{setting}/")
        if key.startswith(f"{setting}/") and rest != "output":
            block, place, tensor = rest.split(".")
            found.setdefault((int(block), place), {})[tensor] = t
    return found


@torch.no_grad()
def fill(site, own):
    assert set(site.trainable()) == set(own)
    for tensor, p in site.trainable().items():
        p.copy_(own[tensor])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_gives_the_outputs_of_the_package_adapters(name, setting):
    model, file = golden(name)
    adapter = weft.attach(model, weft.Bottleneck(preset=setting, r=4, **SETTINGS[setting]))
    given, used = tensors(file, setting), set()
    for block in Structure.of(model).blocks:
        norm = (
            NORMS[name].format(block.index)
            if name in NORMS and setting in ("pfeiffer", "drop")
            else None
        )
        for place, layer in (
            ("attention", block.attention_outputs[0]),
            ("mlp", norm or block.mlp_output),
        ):
            if layer in adapter.sites:
                fill(adapter.sites[layer], given[block.index, place])
                used.add(layer)
    assert used == set(adapter.sites) and len(used) == len(given)
    assert adapter.num_parameters == sum(t.numel() for own in given.values() for t in own.values())
    found = run(model, file)
    assert distance(file[f"{setting}/output"], file["base_output"]) > 0.05, (
        "the adapter does something"
    )
    check_close(found, file[f"{setting}/output"], torch.float32)
    assert float((found - file[f"{setting}/output"]).abs().max()) <= 1e-5 * max(
        1.0, float(found.abs().max())
    )
    weft.detach(model)
    check_close(run(model, file), file["base_output"], torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_the_parallel_rule_at_their_place_gives_their_outputs(name):
    """x is what enters the MLP there, and y what leaves it: the rule's forward knows no more of its
    layer.
    """
    model, file = golden(name)
    rule = weft.Bottleneck(preset="parallel", r=4, nonlinearity="relu", bias=True, scale=4.0)
    given, hooks = tensors(file, "parallel"), []
    twin, _ = golden(
        name
    )  # an adapter of the right shapes: a map of the MLP's input width that is there anyhow
    entry = {
        "bert": "attention.output.dense",
        "roberta": "attention.output.dense",
        "gpt2": "attn.c_proj",
        "llama": "self_attn.o_proj",
    }[name]
    sites = weft.attach(twin, weft.Bottleneck(**{**vars(rule), "targets": [entry]})).sites
    before = {
        "bert": "intermediate",
        "roberta": "intermediate",
        "gpt2": "ln_2",
        "llama": "post_attention_layernorm",
    }[name]
    for block, site in zip(Structure.of(model).blocks, sites.values(), strict=True):
        fill(site, given[block.index, "mlp"])
        seen = {}
        model.get_submodule(f"{block.name}.{before}").register_forward_pre_hook(
            lambda module, args, seen=seen: seen.update(x=args[0])
        )
        hooks.append(
            model.get_submodule(block.mlp_output).register_forward_hook(
                lambda module, args, y, seen=seen, site=site: site.method.forward(
                    seen["x"], y, site.base, site
                )
            )
        )
    found = run(model, file)
    assert distance(file["parallel/output"], file["base_output"]) > 0.05
    check_close(found, file["parallel/output"], torch.float32)
    for hook in hooks:
        hook.remove()
    assert same_bits(run(model, file), run(golden(name)[0], file))


def test_the_files_are_small_and_say_what_made_them():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2e6
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"    {what} " in text for what in ("adapters", "transformers", "torch"))
