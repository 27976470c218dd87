"""Every recipe from its command line to a score: trained for a few steps on a tiny model of its
architecture and a little data of its task, evaluated as the task says, saved, and scored anew by
the command that its head names.
"""

import gc
import json
import re
from pathlib import Path

import pytest
import recipe_data

from judge_server import GRADED, judge
from weft.cli import main
from weft.training.config import read_config

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
OPTIONS = re.compile(r"^#   (\S+): (--set .*)$", re.MULTILINE)
MODELS = {
    "e2e": "gpt2",
    "gpt3": "gpt2",
    "glue": "roberta",
    "commonsense": "llama",
    "mtbench": "llama",
    "image": "vit",
}
FILES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
# What a head names besides: other tasks run; other models of the same task do not, since the model
# is replaced here.
OTHERS = {
    (stem, name): options
    for stem in FILES
    for name, options in OPTIONS.findall((RECIPES / f"{stem}.yaml").read_text(encoding="utf-8"))
    if "task=" in options
}
FROM_MNLI = "glue-roberta-base-lora"  # its options are run in one test, in their order
QUICK = {
    ("gpt3-lora", "samsum"),
    ("image-vit-base-vera", "resisc45"),
    ("glue-roberta-base-vera", "stsb"),
    ("glue-roberta-large-lora", "cola"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = recipe_data.models(tmp_path_factory.mktemp("recipes"))
    gc.collect()
    # the Trainer collects garbage in every run, and all of transformers is there to be looked
    # through
    gc.freeze()
    yield folder
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a recipe's out is runs/..., from where the command is given
    monkeypatch.setattr(
        "weft.training.curves.draw", lambda *a: False
    )  # half of the time of so small a run
    monkeypatch.setattr(
        "weft.tasks.caption_scores.has_java", lambda: False
    )  # METEOR reads tables for ten seconds


def settings(place, stem, options=""):
    """What a user with a small model and little time adds to a recipe's command."""
    given = [option.strip() for option in options.split("--set ")[1:]]
    config = read_config(RECIPES / f"{stem}.yaml", given)
    given += [
        f"model.path={place / MODELS[stem.split('-')[0]]}",
        "train.epochs=null",
        "train.steps=5",
        "train.device=cpu",
    ]
    if config.task is not None:
        given.append(f"task={recipe_data.task(place, config.task.partition(':')[0])}")
    if config.optim.warm_up >= 1:
        given.append("optim.warm_up=0.2")
    if stem.startswith(("e2e", "gpt3")):
        given += ["eval.records=1", "eval.every=5"]
    if config.train.accumulate > 1:
        given.append("train.accumulate=2")
    return given


def trained(stem, given):
    """Train, and what the run's directory says of it."""
    words = [word for setting in given for word in ("--set", setting)]
    assert main(["train", str(RECIPES / f"{stem}.yaml"), *words]) == 0
    config = read_config(RECIPES / f"{stem}.yaml", given)
    record = json.loads((Path(config.out) / "run.json").read_text())
    assert record["status"] == "finished" and record["steps_done"] == 5
    return config, record


def scored(config, split="test"):
    """The task's scores of the saved adapter, by `weft eval`."""
    words = [
        "eval",
        "--model",
        config.model.path,
        "--adapter",
        f"{config.out}/adapter",
        "--task",
        config.task,
        "--json",
        "scores.json",
        "--device",
        "cpu",
        "--split",
        split,
    ]
    assert main([*words, *(["--limit", "2"] if config.task.startswith("commonsense") else [])]) == 0
    return json.loads(Path("scores.json").read_text())["scores"]


def check(config, record):
    """What the run chose by is in its evaluation, and the task's own metric can be had from the
    saved adapter.
    """
    found = scored(config)
    main_metric = next(iter(found))
    assert found[main_metric] is not None or main_metric in ("Pearson", "Matthews")
    chosen = config.eval.best
    assert record["evaluation"]["loss"] > 0 and (
        chosen is None or record["evaluation"][chosen] is not None
    )
    assert chosen in (None, "loss", main_metric)
    return found


@pytest.mark.parametrize("stem", [stem for stem in FILES if not stem.startswith("mtbench")])
def test_a_recipe_runs_from_its_command_to_a_score(place, stem):
    config, record = trained(stem, settings(place, stem))
    found = check(config, record)
    if config.task.startswith(
        ("glue", "sst2", "cifar100")
    ):  # the same adapter and the same samples: the same number
        assert scored(config, "validation")["accuracy"] == pytest.approx(
            record["evaluation"]["accuracy"]
        )
    assert all(value is None or value >= 0 for value in found.values())


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in OTHERS
        if case[0] != FROM_MNLI
    ],
)
def test_the_other_tasks_of_a_recipe_run_too(place, stem, name):
    check(*trained(stem, settings(place, stem, OTHERS[stem, name])))


def test_mrpc_rte_and_stsb_begin_with_the_mnli_adapter_as_their_options_say(place, capsys):
    for name in ("mnli", "rte", "stsb", "mrpc"):
        given = settings(place, FROM_MNLI, OTHERS[FROM_MNLI, name])
        config, record = trained(FROM_MNLI, [*given, *([] if name == "mnli" else [f"out={name}"])])
        check(config, record)
        said = capsys.readouterr().err
        if name != "mnli":
            assert (
                record["started_from"]["head"] == "new" and "Begins with the adapter runs/" in said
            )


@pytest.mark.parametrize("stem", [stem for stem in FILES if stem.startswith("mtbench")])
def test_a_chat_model_is_trained_answers_and_is_judged(place, stem, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    data, template = recipe_data.alpaca(Path("alpaca_data.json")), RECIPES / "alpaca.jinja"
    config, _ = trained(
        stem, [*settings(place, stem), f"data.train={data}", f"data.chat_template={template}"]
    )
    answer = [
        "--questions",
        str(recipe_data.questions(Path("question.jsonl"))),
        "--model",
        config.model.path,
        "--adapter",
        f"{config.out}/adapter",
        "--chat-template",
        str(template),
        "--max-new-tokens",
        "4",
        "--device",
        "cpu",
    ]
    with judge(lambda n, body: GRADED) as seen:
        assert main(["judge", *answer, "--url", seen.url, "--judge", "j", "--json", "s.json"]) == 0
    assert len(seen.bodies) == 2 and "7" in Path("s.json").read_text()


def test_instructions_are_read_as_the_model_will_be_asked(place, capsys):
    """The loss is on the answer and its end, and what stands before it is the prompt that weft
    judge makes.
    """
    from transformers import AutoTokenizer

    from weft.encoding.render import Renderer

    template = RECIPES / "alpaca.jinja"
    data = recipe_data.alpaca(Path("alpaca_data.json"))
    words = ["train", str(RECIPES / "mtbench-llama-lora.yaml"), "--preview"]
    for setting in (
        f"model.path={place / 'llama'}",
        f"data.train={data}",
        f"data.chat_template={template}",
    ):
        words += ["--set", setting]
    assert main(words) == 0
    said = capsys.readouterr().out.split("sample 2 of 8")[1].partition("\n")[2]
    before = Renderer(
        AutoTokenizer.from_pretrained(place / "llama"), 512, template=template.read_text()
    ).chat_prompt([{"role": "user", "content": "Add 1.\n\nto 2"}])
    assert before.startswith("<s>Below is an instruction") and before.endswith(
        "Add 1.\n\nto 2\n\n### Response:\n"
    )
    assert said.startswith(before + "⟦3.</s>⟧")


def test_the_saved_adapter_of_a_recipe_generates(place, capsys):
    config, _ = trained(
        "e2e-gpt2-medium-vera", [*settings(place, "e2e-gpt2-medium-vera"), "eval.records=0"]
    )
    assert (
        main(
            [
                "generate",
                "--model",
                config.model.path,
                "--adapter",
                f"{config.out}/adapter",
                "--prompt",
                "name : A\n",
                "--max-new-tokens",
                "3",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
