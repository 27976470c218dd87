"""One attach searches each part of a model at most once, and a structure outlives no call."""

import pytest
import torch
from torch import nn

import weft
from architectures import ARCHITECTURES
from weft.model.structure import Structure
from weft.model.structure import structure as parts

SEARCHES = ("find_block_names", "describe_blocks", "find_head", "find_experts", "map_parts")
CONFIGS = {
    "BitFit": weft.BitFit(),
    "TopLayers": weft.TopLayers(k=1),
    "LoRA": weft.LoRA(r=2, targets=["attention", "mlp"], modules_to_save=["ln_f"]),
    "LoRA:all-linear": weft.LoRA(r=2),
    "Bottleneck": weft.Bottleneck(r=2),
    "Bottleneck:skip": weft.Bottleneck(r=2, skip_layers=1),
    "Prefix": weft.Prefix(n=2),
    "PreEmbed": weft.PreEmbed(l_p=2),
    "PreLayer": weft.PreLayer(l_p=2),
}


@pytest.fixture
def counts(monkeypatch):
    """How often each search has run, and how many structures were made."""
    found = dict.fromkeys((*SEARCHES, "Structure"), 0)

    def counted(name, search):
        def run(*args):
            found[name] += 1
            return search(*args)

        return run

    for name in SEARCHES:
        monkeypatch.setattr(parts, name, counted(name, getattr(parts, name)))
    init = Structure.__init__
    monkeypatch.setattr(Structure, "__init__", counted("Structure", init))
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_one_attach_scans_the_blocks_once(config, counts):
    model = ARCHITECTURES["gpt2"].build()
    weft.attach(model, config)
    assert counts["Structure"] == 1 and counts["find_block_names"] == 1
    assert max(counts.values()) == 1, counts


def test_loading_scans_the_blocks_once(counts, tmp_path):
    model = ARCHITECTURES["gpt2"].build()
    weft.attach(model, CONFIGS["LoRA"]).save(tmp_path)
    counts.update(dict.fromkeys(counts, 0))
    weft.load(ARCHITECTURES["gpt2"].build(), tmp_path)
    assert counts["find_block_names"] == 1


def test_a_model_that_has_changed_between_two_calls_is_searched_again():
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 5))
    weft.attach(model, weft.LoRA(r=2))
    weft.detach(model)
    model.append(nn.Linear(5, 3))
    assert set(weft.attach(model, weft.LoRA(r=2)).sites) == {"0", "1", "2"}
    with torch.no_grad():
        model(torch.randn(2, 7))


PARTS = ("modules", "parameters", "norms", "head", "blocks")


def test_the_parts_are_the_same_with_and_without_an_adapter():
    model = ARCHITECTURES["gpt2"].build()
    before = {part: list(getattr(Structure.of(model), part)) for part in PARTS}
    weft.attach(model, weft.LoRA(r=2))
    weft.attach(model, weft.Prefix(n=2), name="prefix")
    assert before == {part: list(getattr(Structure.of(model), part)) for part in PARTS}
    assert before["norms"] == [
        f"transformer.{n}" for i in range(3) for n in (f"h.{i}.ln_1", f"h.{i}.ln_2")
    ] + ["transformer.ln_f"]
