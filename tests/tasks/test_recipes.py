"""The recipes: every file and every line of options in it is a configuration of `weft train`, and
says where it is from.
"""

import re
from pathlib import Path

import pytest

from weft.tasks import IMAGES, find_generation, find_task

config = pytest.importorskip("weft.training.config", reason="the trainer is not in this checkout")

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))
OPTIONS = re.compile(r"^#   (\S+): (--set .*)$", re.MULTILINE)
CASES = [
    (path, name, options)
    for path in FILES
    for name, options in [("", ""), *OPTIONS.findall(path.read_text(encoding="utf-8"))]
]


def test_there_are_recipes_and_the_readme_names_their_families():
    assert len(FILES) == 20 and len(CASES) > 50
    listed = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{path.stem.split('-')[0]}-" in listed for path in FILES)


@pytest.mark.parametrize(
    ("path", "name", "options"), CASES, ids=[f"{p.stem}-{n}" for p, n, _ in CASES]
)
def test_a_recipe_is_a_configuration_of_the_trainer(path, name, options):
    settings = options.split("--set ")[1:]
    run = config.read_config(path, [setting.strip() for setting in settings])
    assert run.out == f"runs/{path.stem}" + (
        "-mnli" if name == "mnli" else ""
    )  # others begin with that one
    plain = config.to_dict(run)
    for setting in settings:
        key, _, value = setting.strip().partition("=")
        held = plain
        for part in key.split("."):
            held = held[part]
        assert held == (type(held)(value) if isinstance(held, int | float) else value), setting
    if run.task is not None and run.task.partition(":")[0] not in IMAGES:
        kind = run.task.partition(":")[0]
        labelled = kind.removesuffix("-paper") in (
            "sst2",
            "mrpc",
            "cola",
            "qnli",
            "rte",
            "stsb",
            "mnli",
        )
        (find_task if labelled else find_generation)(run.task)
        assert (
            run.eval.best in (None, "loss", "BLEU", "ROUGE-1", "logical-form accuracy") or labelled
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_number_of_a_recipe_has_its_source_or_says_that_it_is_unknown(path):
    text = path.read_text(encoding="utf-8")
    assert re.search(r"arXiv:\d{4}\.\d{5}", text)
    free = r"\s+(name|path|kind|seed|batch|accumulate|precision|dtype|train|keep|every|gradient_checkpointing):"
    numbers = [
        line
        for line in text.split("\n")
        if re.match(r"\s+\w+: \S", line) and not re.match(free, line)
    ]
    assert all("#" in line for line in numbers), numbers
