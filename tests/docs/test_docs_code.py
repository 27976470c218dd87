"""What README and docs print as code runs: Python as printed, a page from top to bottom; commands
with their options.
"""

import docs_tables
import pytest
from documents import (
    ALL,
    COMING,
    HUB_MODEL,
    ROOT,
    VISION_MODEL,
    blocks,
    commands,
    named,
    small_llama,
    small_llava,
)

from weft.cli import COMMANDS
from weft.cli.plan import _method_config
from weft.compare.plan.entries import parse_methods

RUN = [page for page in ALL if blocks(page, "python") and page not in COMING]


# transformers warns of its own renaming, which peft and TRL have not followed yet, and its Trainer
# pins memory on machines without a GPU.
@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:.*`gradient_checkpointing` is deprecated.*:FutureWarning",
    "ignore:.*'pin_memory' argument.*:UserWarning",
)
@pytest.mark.parametrize("page", RUN, ids=named)
def test_python_runs_as_printed(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_llama(tmp_path / HUB_MODEL)
    if page.name == "vision-language.md":
        small_llava(tmp_path / VISION_MODEL)
    names = {"__name__": "__page__"}
    for block in blocks(page, "python"):
        exec(compile(block, named(page), "exec"), names)  # noqa: S102
    if page.name == "README.md":
        printed = capsys.readouterr().out
        assert (
            "DoRA:" in printed
            and "merged 'mine'" in printed
            and "Nearest endings: ['q_proj'" in printed
        )
        assert (tmp_path / "adapters" / "pets" / "adapter_model.safetensors").is_file()
        assert (tmp_path / "adapters" / "pets-vera" / "adapter_model.safetensors").is_file()


def test_the_readmes_rows_have_the_adapters_that_they_name(tmp_path, monkeypatch):
    """The first block's last step, looked at more closely than its printed text allows."""
    import torch

    import weft

    monkeypatch.chdir(tmp_path)
    small_llama(tmp_path / HUB_MODEL)
    first = blocks(ROOT / "README.md", "python")[0]
    names = {"__name__": "__page__"}
    with pytest.warns(UserWarning, match="pin_memory"):
        exec(compile(first, "README.md", "exec"), names)  # noqa: S102
    model, batch = names["model"], names["batch"]
    with torch.no_grad():
        with weft.use(model, ["pets", None, "again"]):
            mixed = model(**batch).logits
        for row, name in enumerate(["pets", None, "again"]):
            with weft.use(model, name):
                alone = model(**batch).logits
            assert (mixed[row] - alone[row]).abs().max() < 1e-5
        with weft.use(model, None):
            base = model(**batch).logits
    assert (mixed[0] - base[0]).abs().max() > 1e-3 and torch.equal(mixed[1], base[1])


def understood(words):
    """Parse a command as `weft` does, and read the methods that it names."""
    assert words, "say which command"
    if words[0].startswith("-"):
        return
    assert words[0] in COMMANDS, words
    parser = docs_tables.parser_of(words[0])
    parser.exit = lambda status=0, message=None: pytest.fail(f"weft {' '.join(words)}: {message}")
    args = parser.parse_args(words[1:])
    if words[0] == "plan":
        _method_config(args)
    if words[0] == "compare" and args.methods:
        parse_methods(args.methods)


@pytest.mark.parametrize(
    "page", [page for page in ALL if commands(page) and page not in COMING], ids=named
)
def test_every_command_is_understood(page):
    for words in commands(page):
        understood(words)


def test_a_command_with_an_option_or_field_that_does_not_exist_is_caught():
    for wrong in (
        ["plan", "--model", "M", "--method", "lora", "--rank", "8"],
        ["train", "x.yaml", "--sett", "a=1"],
        ["plan", "--model", "M", "--method", "lora", "--set", "ranks=8"],
        ["compare", "--methods", "lorra"],
    ):
        with pytest.raises((Exception, pytest.fail.Exception)):
            understood(wrong)


def test_every_page_of_a_method_shows_code_and_a_command():
    assert len(RUN) >= 15
    for page in (ROOT / "docs" / "methods").glob("*.md"):
        assert blocks(page, "python") and commands(page), page.name


def test_pages_that_wait_for_their_method_do_so_still():
    """Once the methods are there, COMING in scripts/docs_tables.py goes, and the blocks run."""
    from weft.methods import METHODS

    assert not set(docs_tables.COMING) & set(METHODS), (
        "delete the line COMING = ... in scripts/docs_tables.py"
    )
