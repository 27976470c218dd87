"""`weft train` end to end on small models: the directory it leaves, what is minimised, and what
stops it.
"""

import gc
import json
import math
from dataclasses import replace
from io import StringIO

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy

import weft
from weft.cli import main
from weft.errors import AuditError, ConfigError, WeftError
from weft.training import from_dict, train
from weft.training.best import best_index, stale
from weft.training.config import OptimSection
from weft.training.losses import DivergedError
from weft.training.optimizer import groups
from weft.training.sampling import EpochOrder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    tiny.language_model(folder / "lm")
    tiny.encoder(folder / "bert")
    tiny.pairs(folder / "pairs.jsonl", 12)
    tiny.labelled(folder / "labelled.csv", 16)
    gc.collect()
    # the Trainer collects garbage in every run, and all of transformers is there to be looked
    # through
    gc.freeze()
    yield folder
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_picture(request, monkeypatch):
    """It is half of the time of so small a run; one test looks at it."""
    if "directory_tells" not in request.node.name:
        monkeypatch.setattr("weft.training.curves.draw", lambda *a: False)


def config(place, out, **changes):
    data = {
        "out": str(out),
        "model": {"path": str(place / "lm")},
        "method": {"name": "LoRA", "r": 2},
        "data": {"train": str(place / "pairs.jsonl")},
        "optim": {"lr": 1e-2, "warm_up": 0},
        "train": {"steps": 4, "batch": 4, "device": "cpu"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        data[section] = {**data.get(section, {}), name: value} if name else value
    return from_dict(data)


def run(place, out, **changes):
    said = StringIO()
    return train(config(place, out, **changes), stream=said), said.getvalue()


def rows(out, kind):
    return [
        row
        for row in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        if row["kind"] == kind
    ]


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning"
)  # peft asks for it by its old name
def test_the_directory_tells_everything_and_the_adapter_loads_as_the_card_says(
    place, tmp_path, capsys
):
    from transformers import AutoModelForCausalLM

    path = tmp_path / "c.yaml"
    out = tmp_path / "out"
    path.write_text(
        json.dumps(
            {
                "out": str(out),
                "model": {"path": str(place / "lm")},
                "method": {"name": "LoRA", "r": 2, "dropout": 0.1},
                "data": {"train": str(place / "pairs.jsonl"), "eval_share": 0.25},
                "train": {"batch": 3, "device": "cpu"},
            }
        )
    )
    assert main(["train", str(path), "--set", "optim.lr=1e-2", "--set", "train.epochs=2"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 6 + 2 and "\r" not in "".join(lines)
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "adapter",
        "checkpoints",
        "config.yaml",
        "curves.png",
        "log.jsonl",
        "run.json",
        "tokenizer",
    ]
    logged = rows(out, "train")
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert all(
        row["loss"] > 0
        and row["grad_norm"] > 0
        and row["tokens_per_second"] > 0
        and row["memory_bytes"] > 0
        for row in logged
    )
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished" and record["config"]["optim"]["lr"] == 1e-2
    assert record["sessions"][0]["versions"]["torch"] == torch.__version__
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    loading = (
        card.split("```python\n")[1]
        .split("```")[0]
        .replace('"adapter"', repr(str(out / "adapter")))
    )
    names = {}
    exec(loading, names)  # noqa: S102 -- the card that was just written
    ids = torch.tensor([[5, 9, 33, 7]])
    with torch.no_grad():
        ours = names["model"].eval()(ids).logits
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(place / "lm")
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, out / "adapter").eval()(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5) and "PeftModel" in card
    assert main(["train", str(path), "--resume"]) == 2  # of another configuration
    assert (
        main(["train", str(path), "--resume", "--set", "optim.lr=1e-2", "--set", "train.epochs=2"])
        == 0
    )
    assert "finished" in capsys.readouterr().err


def test_preview_shows_what_is_in_the_loss_and_loads_no_weights(
    place, tmp_path, capsys, monkeypatch
):
    import transformers

    def refuse(*a, **k):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    path = tmp_path / "c.yaml"
    path.write_text(
        json.dumps(
            {
                "out": str(tmp_path / "o"),
                "model": {"path": str(place / "lm")},
                "method": {"name": "LoRA"},
                "data": {"train": str(place / "pairs.jsonl"), "max_length": 12},
            }
        )
    )
    assert main(["train", str(path), "--preview"]) == 0
    out = capsys.readouterr().out
    assert "1 + 1 =⟦ x2</s>⟧" in out and "end-of-turn cut off 4" in out
    assert not (tmp_path / "o").exists()


def test_a_classifier_gets_a_new_head_at_its_own_rate_and_the_best_adapter_is_kept(place, tmp_path):
    flipped = tmp_path / "flipped.csv"
    text = (place / "labelled.csv").read_text()
    flipped.write_text(text.replace(",yes", ",?").replace(",no", ",yes").replace(",?", ",no"))
    done, said = run(
        place,
        tmp_path / "o",
        model__path=str(place / "bert"),
        data__train=str(place / "labelled.csv"),
        data__eval=str(flipped),
        optim__head_lr=5e-2,
        eval__every=3,
        eval__best="loss",
        eval__patience=2,
        train__steps=30,
    )
    assert "trained from new values: classifier" in said
    second = rows(tmp_path / "o", "train")[1]
    assert second["lrs"] == pytest.approx({"adapter": second["lr"], "head": 5 * second["lr"]})
    losses = [row["loss"] for row in rows(tmp_path / "o", "eval")]
    assert (
        done.step < 30 and len(losses) == best_index([-x for x in losses]) + 3
    )  # it learns the opposite and is stopped
    assert done.evaluation["loss"] == min(losses)
    kept = weft.load(weights_of(place, 2), tmp_path / "o" / "adapter")
    assert same(kept, weft.load(weights_of(place, 2), tmp_path / "o" / "best")) and same(
        kept, done.adapter
    )
    assert json.loads((tmp_path / "o" / "run.json").read_text())["classes"] == ["no", "yes"]


def weights_of(place, labels):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(place / "bert", num_labels=labels)


def same(a, b):
    b = dict(b.named_parameters())
    return all(torch.equal(p, b[n]) for n, p in a.named_parameters())


def test_numbers_as_labels_are_a_regression(place, tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text(
        "sentence1,sentence2,label\n" + "".join(f"a {i},b {i},{i / 4}\n" for i in range(8))
    )
    run(
        place,
        tmp_path / "o",
        model__path=str(place / "bert"),
        model__kind="regression",
        data__train=str(path),
        data__eval=str(path),
    )
    found = rows(tmp_path / "o", "eval")[-1]
    assert -1 <= found["Pearson"] <= 1 and found["loss"] > 0


@pytest.mark.parametrize("method", ["LoRA", "DVoRA"])
def test_accumulation_and_gradient_checkpointing_change_nothing(place, tmp_path, method):
    name = {"method__name": method, "method__dropout": 0.0}
    plain, _ = run(place, tmp_path / "a", **name)
    parts, _ = run(place, tmp_path / "b", train__batch=2, train__accumulate=2, **name)
    again, _ = run(place, tmp_path / "c", train__gradient_checkpointing=True, **name)
    for (key, p), q, r in zip(
        plain.adapter.named_parameters(),
        parts.adapter.parameters(),
        again.adapter.parameters(),
        strict=True,
    ):
        assert torch.allclose(p, q, atol=2e-4), (
            key
        )  # Adam turns rounding of small gradients into steps
        assert torch.equal(p, r), key
    losses = [[row["loss"] for row in rows(tmp_path / run, "train")] for run in "abc"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] == losses[2]
    assert any(getattr(m, "gradient_checkpointing", False) for m in again.model.modules())


def test_the_evaluation_loss_is_the_mean_over_all_tokens_whatever_the_batch(place, tmp_path):
    done, _ = run(
        place,
        tmp_path / "a",
        data__eval=str(place / "pairs.jsonl"),
        eval__batch=5,
        optim__label_smoothing=0.1,
    )
    total = count = 0
    for line in (place / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, said = (
            done.tokenizer(row[key], add_special_tokens=False)["input_ids"]
            for key in ("prompt", "completion")
        )
        ids = torch.tensor([prompt + said + [2]])
        with torch.no_grad():
            logits = done.model.eval()(ids).logits[0]
        total += float(
            cross_entropy(logits[len(prompt) - 1 : -1], ids[0, len(prompt) :], reduction="sum")
        )
        count += len(said) + 1
    assert done.evaluation["loss"] == pytest.approx(total / count, rel=1e-5)
    assert done.evaluation["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_groups_have_the_rates_asked_for(place):
    model = weights_of(place, 2)
    adapter = weft.attach(model, weft.DoRA(r=2, targets=["query"], modules_to_save=["classifier"]))
    optim = OptimSection(lr=1e-3, head_lr=1e-2, lr_factors={"B": 16.0}, weight_decay=0.1)
    found = {
        (g["name"], g["weight_decay"]): (g["lr"], sum(p.numel() for p in g["params"]))
        for g in groups(adapter, optim)
    }
    assert found == {
        ("adapter", 0.1): (1e-3, 64),
        ("B", 0.1): (1.6e-2, 64),
        ("adapter", 0.0): (1e-3, 32),
        ("head", 0.1): (1e-2, 32),
        ("head", 0.0): (1e-2, 2),
    }
    weft.detach(model)
    with pytest.raises(ConfigError, match=r"no head is trained. Name it in modules_to_save"):
        groups(weft.attach(model, weft.LoRA(r=2)), optim)


def test_the_order_of_samples_depends_on_seed_and_epoch_alone():
    order = EpochOrder(9, 3)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    order.set_epoch(0)
    assert (
        list(order) == first != second
        and sorted(second) == list(range(9))
        and list(EpochOrder(9, 4)) != first
    )


def test_the_audit_stops_a_run_whose_tensors_do_not_train(place, tmp_path, monkeypatch):
    from weft.training import trainer

    kept = trainer.groups
    monkeypatch.setattr(
        trainer,
        "groups",
        lambda adapter, optim: [
            {**g, "params": [p for p in g["params"] if p.shape[0] != 2]}
            for g in kept(adapter, optim)
        ],
    )
    with pytest.raises(AuditError, match=r"q_proj.A: it has a gradient but did not move"):
        run(place, tmp_path / "o")


def test_too_few_steps_for_the_audit_and_a_loss_that_is_lost(place, tmp_path):
    with pytest.raises(WeftError, match="Train for at least that many"):
        run(place, tmp_path / "a", train__steps=2)
    with pytest.raises((DivergedError, WeftError), match=r"the loss became|NaN or infinit"):
        run(place, tmp_path / "b", optim__lr=1e30, optim__clip=0, train__steps=8)


def test_bfloat16_runs(place, tmp_path):
    done, _ = run(place, tmp_path / "o", train__precision="bfloat16", model__dtype="bfloat16")
    assert {p.dtype for p in done.adapter.parameters()} == {torch.float32}
    assert rows(tmp_path / "o", "train")[-1]["loss"] > 0


def test_a_terminal_gets_a_bar_with_the_time_left(place, tmp_path):
    class Terminal(StringIO):
        def isatty(self):
            return True

    said = Terminal()
    train(config(place, tmp_path / "o"), stream=said)
    assert "4/4 |" in said.getvalue() and "left  loss" in said.getvalue()


def test_what_would_be_ignored_is_refused(place, tmp_path, capsys):
    template = tmp_path / "t.jinja"
    template.write_text(tiny.CHATML)
    for changes, said in (
        ({"data__chat_template": str(template)}, "is for data.format=messages"),
        ({"data__split": "test"}, "chooses a split of a hub name"),
        ({"eval__records": 3}, "for a task whose answers are generated"),
        ({"data__format": "text"}, "needs the columns text"),
        ({"model__labels": ["a", "b"]}, "names classes"),
        ({"model__kind": "classification"}, "do not go together"),
    ):
        with pytest.raises(WeftError, match=said):
            run(place, tmp_path / "o", **changes)


def test_a_reporter_that_is_not_installed_is_named(place, tmp_path, monkeypatch):
    import importlib.util

    kept = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "mlflow" else kept(name, *a)
    )
    with pytest.raises(ConfigError, match="pip install mlflow"):
        run(place, tmp_path / "o", log__report_to=["mlflow"])


def test_patience_counts_evaluations_without_a_better_one():
    assert [stale([1, 2, 1.9, 1.5][:n], 0.0) for n in (1, 2, 3, 4)] == [0, 0, 1, 2]
    assert stale([1, 1.05, 1.2], 0.1) == 0 and stale([1, 1.05, 1.09], 0.1) == 2
    assert best_index([1, 3, 3]) == 1


def boolq(folder):
    for split, n in (("train", 1210), ("test", 3)):
        (folder / "boolq").mkdir(exist_ok=True)
        (folder / "boolq" / f"{split}.json").write_text(
            json.dumps(
                [
                    {"instruction": f"Is {i} even?", "input": "", "answer": str(i % 2 == 0).lower()}
                    for i in range(n)
                ]
            )
        )
    return folder


def test_a_task_is_trained_answered_and_scored(place, tmp_path, capsys):
    task = f"boolq:{boolq(tmp_path)}"
    data = config(place, tmp_path / "o")
    data = from_dict(
        {
            "out": str(tmp_path / "o"),
            "model": {"path": str(place / "lm")},
            "method": {"name": "LoRA", "r": 2},
            "task": task,
            "train": {"steps": 4, "batch": 2, "device": "cpu"},
            "data": {"max_length": 1000},
            "eval": {"records": 2, "best": "accuracy", "batch": 8},
        }
    )
    done = train(data, stream=StringIO())
    assert 0 <= done.evaluation["accuracy"] <= 1 and done.evaluation["loss"] > 0
    words = [
        "eval",
        "--model",
        str(place / "lm"),
        "--adapter",
        str(done.out / "adapter"),
        "--task",
        task,
    ]
    assert (
        main([*words, "--json", str(tmp_path / "s.json"), "--outputs", str(tmp_path / "a.jsonl")])
        == 0
    )
    assert json.loads((tmp_path / "s.json").read_text())["examples"] == 3
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ConfigError, match="the metrics of causal-lm are loss"):
        train(
            replace(data, out=str(tmp_path / "p"), eval=replace(data.eval, best="BLEU")),
            stream=StringIO(),
        )


def test_generate_continues_as_one_prompt_alone_would(place, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = [
        "generate",
        "--model",
        str(place / "lm"),
        "--max-new-tokens",
        "4",
        "--prompt",
        "abc",
        "--prompt",
        "longer",
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    model, tokenizer = (
        cls.from_pretrained(place / "lm") for cls in (AutoModelForCausalLM, AutoTokenizer)
    )
    alone = ""
    for prompt in ("abc", "longer"):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )
        alone += tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    assert out == alone
    assert main([*words, "--set", "num_beam=2"]) == 2
    assert "Nearest: num_beams" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["PreEmbed", "PreLayer"])
def test_virtual_tokens_behind_the_prompt_stand_before_the_answer_while_it_trains(
    place, tmp_path, method
):
    """The Trainer takes the labels out of a batch for a loss of one's own; the model must know them
    all the same.
    """
    done, _ = run(
        place,
        tmp_path / "a",
        data__eval=str(place / "pairs.jsonl"),
        eval__batch=5,
        method={"name": method, "l_p": 1, "l_i": 2},
    )
    total = count = 0
    for line in (place / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, said = (
            done.tokenizer(row[key], add_special_tokens=False)["input_ids"]
            for key in ("prompt", "completion")
        )
        ids = torch.tensor([prompt + said + [2]])
        with (
            torch.no_grad()
        ):  # as when it generates: the prompt, and then the answer behind it in the cache
            out = done.model.eval()(ids[:, : len(prompt)], use_cache=True)
            key = next(key for key in ("cache", "past_key_values") if key in out)
            steps = [
                done.model(
                    ids[:, k : k + 1],
                    attention_mask=torch.ones(1, k + 1, dtype=torch.long),
                    **{key: out[key]},
                )
                for k in range(len(prompt), ids.shape[1] - 1)
            ]
            logits = [one.logits[0, -1] for one in (out, *steps)]
        total += float(cross_entropy(torch.stack(logits), ids[0, len(prompt) :], reduction="sum"))
        count += len(said) + 1
    assert done.evaluation["loss"] == pytest.approx(total / count, rel=1e-5)
