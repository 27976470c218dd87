"""`exclude`, `within` and `layers`: what they take away, and that a name without effect is an error."""

import pytest
from test_targets import ATTENTION, MLP, Plain
from torch import nn

import weft
from architectures import ARCHITECTURES
from support import RULES, config
from weft import methods
from weft.compare.plan.entries import parse_methods
from weft.training.config import from_dict, to_dict

TWO = (("text", 2), ("image", 4))
EVERY = [*ATTENTION[:2], *MLP[:2], *ATTENTION[2:], *MLP[2:], "project"]
SECOND = [*ATTENTION[2:], *MLP[2:]]


def adapted(model: nn.Module, **fields):
    found = list(weft.attach(model, weft.LoRA(r=2, **fields)).layers)
    weft.detach(model)
    return found


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"exclude": "project"}, EVERY[:-1]),
        ({"exclude": ["up", "q_proj"]}, [n for n in EVERY if n[-2:] != "up" and "q_" not in n]),
        ({"exclude": ["attn", "project"]}, MLP),  # a module stands for the layers in it
        ({"exclude": "attention"}, [*MLP, "project"]),
        ({"exclude": ("blocks.0", "project")}, SECOND),
        ({"exclude": {r"blocks\..*"}}, ["project"]),
        ({"exclude": ["embed", "head"]}, EVERY),  # "all-linear" leaves them out anyway
        ({"targets": ["q_proj", "embed"], "exclude": "blocks.0"}, ["embed", ATTENTION[2]]),
        ({"layers": 1}, SECOND),
        ({"layers": [1, 0, 1]}, EVERY[:-1]),
        ({"layers": range(1), "targets": "mlp"}, MLP[:2]),
        ({"layers": 0, "exclude": "attn"}, MLP[:2]),
        ({"within": "attn"}, ATTENTION),
        ({"within": ["blocks.1", "project"]}, [*SECOND, "project"]),
        ({"within": "attn", "layers": 1, "exclude": "v_proj"}, [ATTENTION[2]]),
        ({"targets": {"q_proj": {"r": 1}, "up": {}}, "layers": 0}, [ATTENTION[0], MLP[0]]),
    ],
    ids=str,
)
def test_layers_are_taken_away(fields, wanted):
    assert adapted(Plain(), **fields) == wanted


def test_block_numbers_count_in_every_stack():
    """Of several stacks each has the blocks of these numbers, as far as it goes."""
    stacks = {n: nn.ModuleList(nn.Sequential(nn.Linear(3, 3)) for _ in range(k)) for n, k in TWO}
    model = nn.ModuleDict(stacks)
    assert adapted(model, layers=[1, 2]) == ["text.1.0", "image.1.0", "image.2.0"]
    assert adapted(model, layers=1, within="image") == ["image.1.0"]
    with pytest.raises(weft.TargetError, match="block 2 has none"):
        weft.attach(model, weft.LoRA(layers=[1, 2], within="text"))


@pytest.mark.parametrize(
    "fields", [{"exclude": "layer.0"}, {"exclude": r".*layer\.0\..*"}, {"layers": [1, 2]}]
)
def test_a_norm_that_is_the_output_of_a_block_is_taken_away_too(fields):
    model = ARCHITECTURES["bert"].build()
    whole = weft.attach(model, weft.Bottleneck(preset="pfeiffer", r=2), name="whole")
    found = weft.attach(model, weft.Bottleneck(preset="pfeiffer", r=2, **fields), name="some")
    assert len(whole.layers) == 3 and "LayerNorm" in next(iter(whole.layers))
    assert list(found.layers) == list(whole.layers)[1:]


def test_the_plan_says_why():
    model = Plain()
    adapter = weft.attach(model, weft.LoRA(within="blocks", layers=1, exclude=["up"]))
    reasons = {f.name: f.reason for f in adapter.plan().frozen}
    assert reasons["project"] == "outside of within=['blocks']"
    assert reasons["blocks.0.up"] == "left out by exclude=['up']"
    assert reasons["blocks.0.down"] == "in none of the blocks layers=[1]"
    assert reasons["head"] == "output head"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"exclude": ["up", "dwn"]}, r"exclude: 'dwn' matches none .* Nearest endings: \['down'"),
        ({"exclude": r".*q_project"}, r"exclude: .* \(as a regular expression over the whole name"),
        ({"exclude": "all-linear"}, "leaves nothing to adapt: targets names 9 layers"),
        ({"targets": "up", "exclude": "blocks"}, r"exclude=\['blocks'\]\) leaves nothing"),
        ({"within": "bloks"}, r"within: no module's name ends in 'bloks'. Nearest: \['blocks'\]"),
        (
            {"within": ["attn", "embed"]},
            "none of the 9 layers that targets names is inside 'embed'",
        ),
        ({"layers": [1, 2]}, "there is no block 2; the model's blocks have the numbers 0 to 1"),
        (
            {"layers": [0, 1], "targets": ["blocks.1.up", "project"]},
            "block 0 has none of the layers that targets names",
        ),
        ({"layers": 0, "exclude": "blocks.0"}, "leaves nothing"),
    ],
    ids=str,
)
def test_what_fits_nothing_is_an_error(fields, says):
    model = Plain()
    with pytest.raises(weft.TargetError, match=says):
        weft.attach(model, weft.LoRA(**fields))
    assert not weft.adapters(model)


def test_a_model_without_blocks_has_no_numbers():
    with pytest.raises(weft.TargetError, match="no repeated blocks to number"):
        weft.attach(nn.Sequential(nn.Linear(3, 3)), weft.LoRA(layers=0, targets=["0"]))


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": [-1]},
        {"layers": "0"},
        {"layers": [True]},
        {"layers": True},
        {"layers": [0.0]},
        {"layers": ["layers"]},
        {"exclude": 3},
        {"exclude": [3]},
        {"exclude": [""]},
        {"exclude": ["("]},
        {"exclude": {"up": {}}},
        {"within": ["("]},
        {"within": [r".*\.up"]},
    ],
    ids=str,
)
def test_values_of_another_type_are_refused_before_a_model_is_seen(fields):
    with pytest.raises(weft.ConfigError, match=next(iter(fields))):
        weft.LoRA(**fields)


@pytest.mark.parametrize("method", RULES)
def test_every_method_that_has_targets_has_them(method):
    """...and a file has the fields only if they are set."""
    built = config(method, exclude=["up"], layers=[1, 0], within="blocks")
    assert (built.exclude, built.layers, built.within) == (("up",), (0, 1), ("blocks",))
    assert methods.from_json(methods.to_json(built)) == built
    assert {"exclude", "layers", "within"}.isdisjoint(methods.to_json(config(method)))


@pytest.mark.parametrize("field", ["exclude", "layers", "within"])
def test_they_are_no_override_of_one_layer(field):
    with pytest.raises(weft.ConfigError, match="no field"):
        weft.attach(Plain(), weft.LoRA(targets={"up": {field: 0}}))


def test_from_yaml_and_from_methods():
    method = {"name": "DoRA", "r": 2, "exclude": ["up"], "layers": [1]}
    data = {"out": "x", "model": {"path": "y"}, "data": {"train": "z.jsonl"}, "method": method}
    run = from_dict(data)
    assert run.method == weft.DoRA(r=2, exclude=["up"], layers=[1])
    assert from_dict(to_dict(run)).method == run.method
    (entry,) = parse_methods("dora:r=2:layers=[0,1]:exclude=['up','q_proj']:within=blocks")
    assert entry.config == weft.DoRA(
        r=2, layers=[0, 1], exclude=["up", "q_proj"], within=["blocks"]
    )


@pytest.mark.parametrize("pattern", [r"(\w+\.?)+!", r"(?:(?:(?:\w|\.)*)*)*!"])
def test_an_expression_of_exclude_is_matched_in_bounded_time(pattern):
    """Python's own matcher would take for ever: either it is answered, or refused by its field."""
    with pytest.raises((weft.TargetError, weft.ConfigError), match="exclude: "):
        weft.attach(Plain(), weft.LoRA(exclude=[pattern]))
    with pytest.raises(weft.ConfigError, match=r"exclude: .* cannot be matched"):
        weft.attach(Plain(), weft.LoRA(exclude=[r"(.*)+\1!"]))


def test_a_list_on_a_command_line_needs_no_quotes():
    (entry,) = parse_methods("lora:exclude=[up, q_proj]:within=[blocks,]:init=PISSA".lower())
    assert entry.config == weft.LoRA(exclude=["up", "q_proj"], within="blocks", init="pissa")
