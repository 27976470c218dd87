"""`weft analyze` from directories to report: runs, labels, base, what is compared, and what is
refused.
"""

import json
import shutil

import pytest
import torch
from torch import nn

import support
import weft
from weft.analysis import analyze, read_series
from weft.analysis.analyze import EVERY, roles_of
from weft.cli import main
from weft.errors import CheckpointError, ConfigError
from weft.tasks.models import EMBEDDED


def saved(folder, config, moves=3, model=None, name="checkpoint-{}"):
    """A run: an adapter of `model`, saved after each of some random moves."""
    model = support.net() if model is None else model
    adapter = weft.attach(model, config)
    generator = torch.Generator().manual_seed(5)
    places = []
    for step in range(1, moves + 1):
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        places.append(adapter.save(folder / name.format(10 * step)))
    weft.detach(model)
    return places


def run(capsys, *words):
    status = main(["analyze", *map(str, words)])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


class Stack(nn.Module):
    """Blocks of two maps, for matrices of several roles."""

    def __init__(self, order=range(6)):
        super().__init__()
        torch.manual_seed(0)
        made = [nn.ModuleDict({"up": nn.Linear(5, 8), "down": nn.Linear(8, 5)}) for _ in range(6)]
        self.blocks = nn.ModuleList(made[i] for i in order)


# Which directories are which run


def test_a_run_is_its_checkpoints_in_the_order_of_their_numbers(tmp_path):
    saved(
        tmp_path / "mine" / "checkpoints",
        weft.LoRA(r=2, targets=["mid"]),
        moves=11,
        name="checkpoint-{}",
    )
    (tmp_path / "mine" / "checkpoints" / "checkpoint-5").mkdir()  # half-written: no tensors
    (one,) = read_series([str(tmp_path / "mine")])
    assert one.label == "mine" and [step for step, _ in one.places] == [
        10 * i for i in range(1, 12)
    ]
    (same,) = read_series([str(tmp_path / "mine" / "checkpoints")])
    assert same == one


def test_adapters_of_one_label_are_one_run_and_a_run_without_is_named_by_its_directory(tmp_path):
    a, b, c = saved(tmp_path / "x", weft.LoRA(r=2, targets=["mid"]), name="at{}")
    runs = read_series(
        [f"first={a}", f"{c}", f"first={b}", str(saved(tmp_path / "y", weft.LoRA(r=2))[0].parent)]
    )
    assert [(s.label, [step for step, _ in s.places]) for s in runs] == [
        ("first", [1, 2]),
        ("adapters", [1]),
        ("y", [10, 20, 30]),
    ]
    odd = tmp_path / "a=b"
    shutil.copytree(a, odd)
    assert read_series([str(odd)])[0].places == ((1, odd),)  # a directory that has such a name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{}/none"], "there is no directory"),
        (["l={}/none"], "there is no directory"),
        (["=x"], "write LABEL=DIR"),
        (["l="], "write LABEL=DIR"),
        (["{}"], "neither adapter_model.safetensors nor"),
        (["{}/x/checkpoint-10", "{}/x/checkpoint-10"], "appears twice"),
        (["{}/x/checkpoint-20", "{}/x/checkpoint-10"], r"have the steps \[20, 10\]"),
        (["a={}/x", "a={}/y"], "another run has the label 'a'"),
        (["a={}/x/checkpoint-10", "a={}/y"], "another run has the label 'a'"),
        (["a={}/x", "a={}/y/checkpoint-10"], "another run has the label 'a'"),
    ],
)
def test_what_is_no_series_is_refused_by_name(tmp_path, words, said):
    saved(tmp_path / "x", weft.LoRA(r=2, targets=["mid"]), moves=2)
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    with pytest.raises(ConfigError, match=said):
        read_series([word.format(tmp_path) for word in words])


# Measuring


def test_the_model_is_as_it_was_and_the_points_are_those_of_the_checkpoints(tmp_path):
    places = saved(tmp_path / "run", weft.DoRA(r=2, targets=["layer", "mid"]))
    model = support.net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = analyze(model, read_series([str(tmp_path / "run")]))
    assert not weft.adapters(model) and all(
        support.same_bits(v, before[k]) for k, v in model.state_dict().items()
    )
    weft.load(model, places[1])
    for module in ("layer", "mid"):
        layer = model.get_submodule(module)
        W, changed = before[f"{module}.weight"].double(), weft.effective_weight(layer).double()
        point = next(p for p in found.runs[0].points if p.module == module and p.step == 20)
        assert point.delta_m == pytest.approx(
            float((changed.norm(dim=1) - W.norm(dim=1)).abs().mean()), rel=1e-4
        )
        cos = torch.cosine_similarity(changed, W, dim=1)
        assert point.delta_d == pytest.approx(float((1 - cos).mean()), rel=1e-4)


def test_blocks_in_another_order_change_nothing(tmp_path):
    order = [3, 0, 5, 1, 4, 2]
    straight, mixed = Stack(), Stack(order)
    config = weft.LoRA(r=2, targets=["up", "down"])
    adapter = weft.attach(straight, config)
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.3)
    adapter.save(tmp_path / "a")
    other = weft.attach(mixed, config)
    with torch.no_grad():
        theirs = dict(adapter.named_parameters())
        for name, p in other.named_parameters():
            place = int(name.split(".")[1])
            p.copy_(theirs[name.replace(f"blocks.{place}.", f"blocks.{order[place]}.")])
    other.save(tmp_path / "b")
    weft.detach(straight)
    weft.detach(mixed)
    one, two = (
        analyze(model, read_series([str(tmp_path / name)])).runs[0]
        for model, name in ((straight, "a"), (mixed, "b"))
    )
    assert sorted((p.role, p.delta_m, p.delta_d) for p in one.points) == sorted(
        (p.role, p.delta_m, p.delta_d) for p in two.points
    )
    assert one.relations == two.relations and list(one.relations) == ["up", "down", EVERY]


def test_runs_are_compared_over_the_matrices_that_all_of_them_change(tmp_path):
    saved(tmp_path / "full", weft.Full())
    saved(tmp_path / "lora", weft.LoRA(r=2, targets=["mid"]))
    found = analyze(support.net(), read_series([str(tmp_path / "full"), str(tmp_path / "lora")]))
    assert found.matrices == ("mid",) and found.left_out == {"full": ["layer"]}
    assert "1 matrices of 'full' are left out: another run does not change them." in found.notes
    alone = analyze(support.net(), read_series([str(tmp_path / "full")]))
    assert alone.matrices == ("layer", "mid") and not alone.left_out
    assert analyze(support.net(), read_series([str(tmp_path / "full")]), ["layer"]).matrices == (
        "layer",
    )


def test_a_role_is_the_name_behind_the_number_of_the_block():
    names = [f"encoder.layer.{i}.attention.{w}" for i in (0, 10) for w in ("query", "value")]
    assert list(roles_of(names).values()) == ["attention.query", "attention.value"] * 2
    assert roles_of(["layer", "mid"]) == {"layer": "layers", "mid": "layers"}
    assert set(roles_of(["0", "2"]).values()) == {"layers"}


@pytest.mark.parametrize(
    ("configs", "targets", "error", "said"),
    [
        (
            [weft.LoRA(r=2, targets=["mid"])],
            ["midd"],
            ConfigError,
            r"'midd' matches none of the 1 changed matrices.*'mid'",
        ),
        (
            [weft.LoRA(r=2, targets=["mid"]), weft.LoRA(r=2, targets=["layer"])],
            [],
            ConfigError,
            "no common matrix",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, configs, targets, error, said):
    for number, config in enumerate(configs):
        saved(tmp_path / f"r{number}", config)
    with pytest.raises(error, match=said):
        analyze(
            support.net(),
            read_series([str(tmp_path / f"r{n}") for n in range(len(configs))]),
            targets,
        )


def test_adapters_of_two_methods_are_no_run(tmp_path):
    (a, *_), (b, *_) = (
        saved(tmp_path / c.__name__, c(r=2, targets=["mid"]), name="a{}")
        for c in (weft.LoRA, weft.DoRA)
    )
    with pytest.raises(
        ConfigError, match=r"has adapters of LoRA and.*of DoRA; give each run a label"
    ):
        analyze(support.net(), read_series([str(a), str(b)]))
    (c, *_) = saved(tmp_path / "other", weft.LoRA(r=2, targets=["layer"]), name="a{}")
    with pytest.raises(ConfigError, match="change different matrices: 'layer'"):
        analyze(support.net(), read_series([str(a), str(c)]))


def test_another_base_is_an_error_that_names_layer_and_shapes(tmp_path):
    saved(tmp_path / "run", weft.LoRA(r=2, targets=["mid"]))
    model = support.net()
    model.mid = nn.Linear(11, 8)
    with pytest.raises(
        CheckpointError,
        match=r"(?s)'mid' is a linear layer \[9, 11\].*\[8, 11\].*it was trained on",
    ):
        analyze(model, read_series([str(tmp_path / "run")]))
    assert not weft.adapters(model)


# The command


@pytest.fixture(scope="module")
def vit_runs(tmp_path_factory):
    """Full, LoRA and DoRA on the embedded model, three checkpoints each."""
    import transformers

    folder = tmp_path_factory.mktemp("vit")
    head = {"modules_to_save": ["classifier"]}
    for config in (weft.Full(), weft.LoRA(r=2, **head), weft.DoRA(r=2, **head)):
        model = transformers.AutoModelForImageClassification.from_pretrained(
            EMBEDDED["digits-vit"], num_labels=3, ignore_mismatched_sizes=True
        )
        saved(folder / type(config).__name__, config, model=model)
    return folder


def test_the_command_reports_draws_and_writes(capsys, tmp_path, vit_runs):
    names = ("Full", "LoRA", "DoRA")
    status, out, _ = run(
        capsys,
        "--model",
        "digits-vit",
        "--adapters",
        *(f"{n}={vit_runs / n}" for n in names),
        "--targets",
        "q_proj,fc1",
        "--out",
        tmp_path / "out",
        "--json",
        tmp_path / "all.json",
    )
    assert status == 0 and all(
        len(line) <= 80 for line in out.splitlines() if str(tmp_path) not in line
    )
    for said in (
        "LoRA (LoRA), 3 checkpoints",
        "pooled",
        "between",
        "within",
        "The paper prints r = +0.83 for LoRA",
        "r = -0.62 for full fine-tuning",
        "attention.q_proj",
        "mlp.fc1",
        EVERY,
    ):
        assert said in out, said
    data = json.loads((tmp_path / "all.json").read_text())
    assert (
        data["schema"] == 1
        and [r["label"] for r in data["runs"]] == list(names)
        and len(data["matrices"]) == 8
    )
    for one in data["runs"]:
        assert len(one["points"]) == 8 * 3 and [c["step"] for c in one["checkpoints"]] == [
            10,
            20,
            30,
        ]
        pooled = next(r for r in one["relations"] if (r["role"], r["level"]) == (EVERY, "pooled"))
        assert (
            pooled["points"] == 24
            and pooled["r_interval"][0] <= pooled["r"] <= pooled["r_interval"][1]
        )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "analysis.json",
        "analysis.txt",
        "changes.png",
    ]
    assert (tmp_path / "out" / "analysis.json").read_text() == (tmp_path / "all.json").read_text()
    from PIL import Image

    with Image.open(tmp_path / "out" / "changes.png") as picture:
        assert picture.width > 1200 and len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_only_the_matrices_asked_for(capsys, tmp_path, vit_runs):
    status, out, _ = run(
        capsys,
        "--model",
        "digits-vit",
        "--adapters",
        vit_runs / "LoRA" / "checkpoint-30",
        "--targets",
        "q_proj,v_proj",
        "--json",
        tmp_path / "a.json",
    )
    assert len(json.loads((tmp_path / "a.json").read_text())["matrices"]) == 8 and "mlp" not in out
    assert "16 matrices of 'adapters' are left out: not named by --targets." in " ".join(
        out.split()
    )
    assert (
        status == 0
        and "one checkpoint" in " ".join(out.split())
        and "save.keep" in " ".join(out.split())
    )


def test_bad_arguments_exit_2_with_one_line(capsys, tmp_path, vit_runs):
    lora = vit_runs / "LoRA"
    for words in (
        ["--model", "digits-vit"],
        ["--adapters", lora],
        ["--model", "digits-vit", "--adapters", tmp_path / "no"],
        ["--model", "digits-vi", "--adapters", lora],
        ["--model", "digits-vit", "--adapters", tmp_path],
        ["--model", "digits-vit", "--adapters", lora, "--targets", "query,,value"],
        ["--model", "digits-vit", "--adapters", lora, "--targets", "quary"],
        [
            "--model",
            "digits-vit",
            "--adapters",
            lora,
            "--out",
            lora / "checkpoint-10" / "adapter_config.json",
        ],
        ["--model", "digits-vit", "--adapters", lora, "--layers", "1"],
    ):
        status, out, err = run(capsys, *words)
        assert (
            status == 2 and not out and err.startswith("weft analyze: ") and err.count("\n") == 1
        ), (words, out, err)
