"""What README and docs print as code runs: Python as printed, a page from top to bottom; commands
with their options.
"""

import docs_tables
import pytest
from documents import ALL, COMING, ROOT, blocks, commands, named

from weft.cli import COMMANDS
from weft.cli.plan import _config
from weft.compare.plan.entries import parse_methods

RUN = [page for page in ALL if blocks(page, "python") and page not in COMING]


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"
)  # peft asks transformers for it
@pytest.mark.parametrize("page", RUN, ids=named)
def test_python_runs_as_printed(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__page__"}
    for block in blocks(page, "python"):
        exec(compile(block, named(page), "exec"), names)  # noqa: S102
    if page.name == "README.md":
        printed = capsys.readouterr().out
        assert (
            "DoRA:" in printed
            and "merged 'mine'" in printed
            and "Nearest endings: ['linear2', 'linear1']" in printed
        )
        assert not any("weft" in key for key in names["model"].state_dict())
        assert (names["mixed"][1] - names["mixed"][0]).abs().max() > 0


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
        _config(args)
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
