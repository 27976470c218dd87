"""A configuration checks itself when it is built, says what is allowed, and goes through JSON
unchanged.
"""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import weft
from support import METHODS, RULES, config
from weft import methods


@pytest.mark.parametrize("name", list(METHODS))
def test_a_configuration_is_frozen_comparable_and_keyword_only(name):
    made = config(name)
    assert made == config(name) and hash(made) == hash(config(name))
    field = dataclasses.fields(made)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, field, 1)
    with pytest.raises(TypeError):
        METHODS[name](3)


@pytest.mark.parametrize("name", list(METHODS))
def test_to_json_and_back_is_the_same_configuration(name):
    targets = [
        "all-linear",
        "mlp",
        ["q_proj", "v_proj"],
        r".*\.(q|v)_proj",
        {"q_proj": {"r": 9}, "mlp": {}},
    ]
    made = [config(name, targets=t, modules_to_save=["head"]) for t in targets] + [METHODS[name]()]
    for one in made:
        data = json.loads(json.dumps(methods.to_json(one)))
        assert data["method"] == name and methods.from_json(data) == one


def test_a_torch_dtype_is_taken_and_kept_as_text():
    made = weft.LoRA(dtype=torch.bfloat16, targets={"q_proj": {"dtype": torch.float16}})
    assert (
        made.dtype == "bfloat16"
        and methods.from_json(json.loads(json.dumps(methods.to_json(made)))) == made
    )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("r", 0, "r must be a whole number, 1 or more"),
        ("r", -3, "1 or more"),
        ("r", 2.0, "whole number"),
        ("r", True, "whole number"),
        ("dropout", 1.0, r"dropout must be a number in \[0.0, 1.0\)"),
        ("dropout", -0.1, r"in \[0.0, 1.0\)"),
        ("dropout", float("nan"), r"in \[0.0, 1.0\)"),
        ("seed", -1, r"seed must be a whole number from 0 to 2\*\*63-1"),
        ("seed", 2**63, "seed must be"),
        ("seed", 1.5, "seed must be"),
        ("dtype", "int8", r"dtype must be one of \['float32', 'float64', 'bfloat16', 'float16'\]"),
        ("modules_to_save", "head", r'a list of module name endings, for example \["classifier"\]'),
        ("modules_to_save", [""], "module name endings"),
        ("targets", [], "a list of name endings"),
        ("targets", 5, "a list of name endings"),
        ("targets", "", "is no pattern"),
        ("targets", ["q_proj", 3], "3 is no pattern"),
        ("targets", "q_proj)(", "is no regular expression"),
        ("targets", {}, "a list of name endings"),
        ("targets", {"q_proj": 5}, "write the fields to override as a dict"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_the_class_that_was_written(
    name, field, value, says
):
    if not hasattr(METHODS[name], field):  # a method need not have a rank, or dropout
        return
    with pytest.raises(weft.ConfigError, match=says) as caught:
        METHODS[name](**{field: value})
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, weft.WeftError)
    if field != "targets":
        assert str(caught.value).startswith(f"{name}({field}=")


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: weft.LoRA(alpha=0), r"LoRA\(alpha=0\): alpha must be a number in \(0.0, inf\)"),
        (lambda: weft.DoRA(alpha=-1.0), r"DoRA\(alpha=-1.0\)"),
        (lambda: weft.LoRA(init="zeros"), r"init must be one of \['gaussian', 'kaiming', 'pissa'"),
        (
            lambda: weft.DoRA(norm_grad="detach"),
            r"norm_grad must be one of \['constant', 'exact'\]",
        ),
        (lambda: weft.DVoRA(norm_grad=True), "norm_grad must be one of"),
        (lambda: weft.VeRA(draw="torch"), r"draw must be one of \['weft', 'peft', 'stored'\]"),
        (lambda: weft.VeRA(d_init=float("inf")), r"VeRA\(d_init=inf\)"),
        (lambda: weft.VeRA(d_init=0.0), "no gradient reaches either"),
    ],
)
def test_other_values_that_cannot_be_meant(build, says):
    with pytest.raises(weft.ConfigError, match=says):
        build()


def test_names_are_found_in_any_case_and_unknown_ones_name_the_nearest():
    assert methods.by_name("dvora") is weft.DVoRA and methods.by_name("LORA") is weft.LoRA
    with pytest.raises(weft.ConfigError, match=r"'lorra' is not known. Nearest: \['LoRA'"):
        methods.by_name("lorra")
    with pytest.raises(weft.ConfigError, match=r"Nearest: .*'Full', 'Head'"):
        methods.by_name("xyzzy")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"method": "LoRA", "rank": 3}, r"LoRA has no field 'rank'. Nearest: "),
        ({"method": "LoRA", "alhpa": 3}, r"Nearest: \['alpha'\]"),
        ({"method": "Lora2"}, "'Lora2' is not known"),
        ({"r": 3}, 'an object with a "method" field'),
        ([], 'an object with a "method" field'),
        ({"method": 3}, 'an object with a "method" field'),
        ({"method": "LoRA", "r": 0}, "1 or more"),
    ],
)
def test_json_that_is_no_configuration_is_refused(data, says):
    with pytest.raises(weft.ConfigError, match=says):
        methods.from_json(data)


def test_overrides_change_fields_and_refuse_unknown_ones():
    made = methods.replace(weft.DoRA(r=4, alpha=8, seed=3), {"r": 9, "norm_grad": "exact"})
    assert made == weft.DoRA(r=9, alpha=8, seed=3, norm_grad="exact")
    assert methods.replace(made, {}) is made
    for field in ("rank", "targets", "modules_to_save"):
        with pytest.raises(
            weft.ConfigError, match=f"DoRA has no field '{field}' to override per layer"
        ):
            methods.replace(made, {field: 1})


def scale(**fields):
    return weft.LoRA(**fields).factors(SimpleNamespace(A=torch.ones(1), B=torch.ones(1))).s


def test_the_scale_is_alpha_over_r_or_over_its_root():
    assert scale(r=9, alpha=6) == 6 / 9 and scale(r=9, alpha=6, rslora=True) == 2
    assert scale(r=9) == 1
    assert scale(r=methods.replace(weft.LoRA(r=9), {"r": 4}).r) == 1


@given(
    st.integers(1, 99),
    st.floats(1e-3, 1e3),
    st.floats(0, 0.99),
    st.integers(0, 2**63 - 1),
    st.booleans(),
)
def test_any_sensible_numbers_survive_json(r, alpha, dropout, seed, rslora):
    made = weft.DoRA(r=r, alpha=alpha, dropout=dropout, seed=seed, rslora=rslora)
    again = methods.from_json(json.loads(json.dumps(methods.to_json(made))))
    assert again == made and type(again) is weft.DoRA and (again.r, again.seed) == (r, seed)


def test_starting_values_have_the_spread_that_the_docstring_says():
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Embedding(250, 170))
    spreads = {
        ("gaussian", "0", "A"): 1 / 8,
        ("kaiming", "0", "A"): 1 / 300**0.5 / 3**0.5,
        ("gaussian", "1", "B"): 1 / 8,
        ("kaiming", "1", "B"): 1.0,
    }
    for init in ("gaussian", "kaiming"):
        adapter = weft.attach(model, weft.LoRA(r=8, init=init, targets=["0", "1"]), name=init)
        for module, zero, drawn in (("0", "B", "A"), ("1", "A", "B")):
            site = adapter.sites[module]
            assert not getattr(site, zero).any()
            assert float(getattr(site, drawn).detach().std()) == pytest.approx(
                spreads[init, module, drawn], rel=0.1
            )
    vera = weft.attach(model, weft.VeRA(r=8, targets=["0"]), name="vera").sites["0"]
    assert (vera.d == torch.tensor(0.1)).all() and not vera.b.any()
    assert float(vera.shared.A.abs().max()) == pytest.approx((6 / 300) ** 0.5, rel=0.01)
