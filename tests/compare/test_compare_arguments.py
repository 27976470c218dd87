"""The command line: what is refused, with which status and words; and what the library costs to
import.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from comparing import weft_command

from weft.compare.entries import DEFAULT
from weft.methods import METHODS
from weft.tasks import FAMILIES


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "lroa"], "'LoRA'"),
        (["--methods", "lora:rank=4"], "no field 'rank'"),
        (["--task", "digit"], "'digits'"),
        (["--task", "csv:there-is-no-such.csv"], "there is nothing there"),
        (["--task", "digits:x"], "built in"),
        (["--model", "digit-vit"], "'digits-vit'"),
        (["--model", "./nowhere"], "no such directory"),
        (["--test", "x.csv"], "has its own test data"),
        (["--task", "digits", "--test", "x.csv"], "built in"),
        (["--budget", "step=5"], "'steps'"),
        (["--budget", "seconds"], "seconds=20"),
        (["--budget", "parameters", "--methods", "lora,vera:r=4"], "leave r=4 out"),
        (["--seeds", "0"], "1 or more"),
        (["--workers", "two"], "whole number"),
        (["--head-lr", "-1"], "above 0"),
        (["--methods", "head", "--head-lr", "1"], "--lr head=RATE"),
        (["--lr", "lroa=1"], "'lora'"),
        (["--lr", "lora=fast"], "rates are numbers"),
        (["--device", "gpu"], "'cpu'"),
        (["--json", "no/such/dir/x.json"], "no directory"),
        (["--json", "."], "is a directory"),
        (["--study", "sqlite:///x.db"], "postgresql+psycopg://"),
        (["--study", "localhost"], "postgresql+psycopg://"),
        (["--list", "--seeds", "3"], "--list stands alone"),
        (["--method", "lora"], "--methods"),
        (["digits"], "'digits' belongs to no option"),
    ],
)
def test_bad_arguments_exit_with_two_and_one_line_that_says_what_is_right(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, printed, errors = weft_command("compare", *words)
    assert status == 2
    assert printed == ""
    assert errors.startswith("weft compare: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [(["compar"], "compare"), ([], "compare"), (["--verbose"], "--version"), (["-x"], "-h")],
)
def test_what_is_no_command_exits_with_two_and_the_nearest(words: list[str], message: str) -> None:
    status, printed, errors = weft_command(*words)
    assert (status, printed, errors.count("\n")) == (2, "", 1)
    assert message in errors


@pytest.mark.parametrize(
    "words", [["--help"], ["compare", "--help"], ["compare", "--list"], ["--version"]]
)
def test_help_and_lists_exit_with_zero_at_80_columns(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, printed, errors = weft_command(*words)
    assert (status, errors) == (0, "")
    assert max(map(len, printed.splitlines())) <= 80


def test_list_names_methods_tasks_and_models() -> None:
    printed = weft_command("compare", "--list")[1]
    assert all(name in printed for name in (*DEFAULT, *FAMILIES, "digits-vit"))
    listed = [line.split()[0] for line in printed.splitlines() if " learning rates " in line]
    assert listed == [name.lower() for name in METHODS]


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_needs_no_library_beyond_torch() -> None:
    done = _python(
        "import sys; from weft.cli import main; assert main(['--help']) == 0; main(['compare', "
        "'--help'])\n"
        "heavy = {'transformers', 'sklearn', 'scipy', 'statsmodels', 'matplotlib', 'PIL', 'peft', "
        "'optuna',"
        " 'sqlalchemy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr


def test_sigterm_is_an_interruption(tmp_path: Path) -> None:
    done = _python(
        "import os, signal, sys, time; from weft.cli import main; from weft.compare import sweep\n"
        "def compare(*a): os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        f"sweep.compare = compare; sys.exit(main(['compare', '--out', {str(tmp_path / 'out')!r}]))"
    )
    assert done.returncode == 130, done.stderr
    assert "Interrupted. 0 finished runs are kept" in done.stderr


def test_a_missing_extra_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    done = _python(
        "import sys; sys.modules['matplotlib'] = None; from weft.cli import main\n"
        f"sys.exit(main(['compare', '--out', {str(tmp_path / 'out')!r}]))"
    )
    assert done.returncode == 1
    assert (
        done.stderr
        == "weft compare: matplotlib is needed but not installed: pip install 'weft[train]'\n"
    )
    assert not (tmp_path / "out").exists()
