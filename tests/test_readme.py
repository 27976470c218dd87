"""The README's Python runs as printed, from top to bottom, and its commands exist."""

import re
import shlex
from pathlib import Path

import pytest

from weft.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102
    printed = capsys.readouterr().out
    assert "DoRA:" in printed and "merged 'mine'" in printed and "Nearest endings: ['linear2', 'linear1']" in printed
    assert not any("weft" in key for key in names["model"].state_dict())
    assert (names["mixed"][1] - names["mixed"][0]).abs().max() > 0


def test_every_command_of_the_readme_is_understood(capsys):
    commands = [shlex.split(line[2:], comments=True) for block in blocks("console") for line in block.splitlines()]
    ours = [words[1:] for words in commands if words[0] == "weft"]
    assert len(ours) >= 6
    for words in ours:
        main([words[0], "--help"])
        options = capsys.readouterr().out
        assert all(word in options for word in words if word.startswith("--"))


@pytest.mark.parametrize("name", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_lead_somewhere(name):
    assert (Path(__file__).parent.parent / name).exists()
