"""The directory of a `weft train` run counts as an adapter's directory, for every reader."""

from __future__ import annotations

import gc
import shutil
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import TENSORS, logits, read

import weft
from weft.checkpoint import files
from weft.cli import main

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, and a run of six steps in which the second evaluation of three is the best one."""
    from weft.training import from_dict, train

    folder = tmp_path_factory.mktemp("runs")
    tiny.language_model(folder / "lm")
    tiny.pairs(folder / "pairs.jsonl")
    plain = {
        "out": str(folder / "run"),
        "model": {"path": str(folder / "lm")},
        "method": {"name": "LoRA", "r": 2, "targets": ["q_proj", "up_proj"]},
        "data": {"train": str(folder / "pairs.jsonl"), "eval": str(folder / "pairs.jsonl")},
        "optim": {"lr": 1e-2, "warm_up": 0},
        "train": {"steps": 6, "batch": 4, "device": "cpu"},
        "eval": {"every": 2, "best": "loss"},
        "save": {"every": 3, "keep": 2},
    }
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weft.training.curves.draw", lambda *a: False)
        train(from_dict(plain), stream=StringIO())
        yield folder
    gc.unfreeze()


def base(place: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(place / "lm").eval()


def same(a: Path, b: Path) -> bool:
    left, right = read(a)[0], read(b)[0]
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def run(capsys: Any, *words: Any) -> str:
    status = main([str(word) for word in words])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return shown.out


def copied(place: Path, tmp_path: Path, *without: str) -> Path:
    target = shutil.copytree(place / "run", tmp_path / "run")
    for name in without:
        shutil.rmtree(target / name)
    return target


def test_load_reads_the_result_and_says_so(place):
    direct, through = base(place), base(place)
    weft.load(direct, place / "run" / "adapter")
    adapter = weft.load(through, place / "run")
    assert torch.equal(logits(direct), logits(through))
    assert not torch.equal(logits(direct), logits(base(place)))
    (note,) = adapter.load_report.notes
    assert "a run of weft train, and its adapter was read" in note
    assert "it also has best, checkpoints/checkpoint-6" in note


def test_inspect(place, capsys, tmp_path):
    found = weft.inspect(place / "run")
    assert (found.rows, found.nbytes) == (
        weft.inspect(place / "run" / "adapter").rows,
        (place / "run" / "adapter" / TENSORS).stat().st_size,
    )
    out = run(capsys, "inspect", place / "run")
    assert "LoRA, written by weft" in out and "its adapter was" in out


def test_export(place, capsys, tmp_path):
    out = run(
        capsys, "export", "--adapter", place / "run", "--to", "peft", "--out", tmp_path / "out"
    )
    assert same(tmp_path / "out", place / "run" / "adapter")
    assert "its adapter was read" in " ".join(out.split())


def test_merge_and_generate(place, capsys, tmp_path):
    pairs = ["--model", place / "lm", "--adapter", place / "run"]
    out = run(capsys, "merge", *pairs, "--out", tmp_path / "merged")
    assert "its adapter was read" in " ".join(out.split())
    import transformers

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted = base(place)
    weft.load(adapted, place / "run" / "adapter")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-5)
    words = ["--prompt", "1 + 1 =", "--max-new-tokens", 4]
    through = run(capsys, "generate", *pairs, *words)
    pairs[-1] = place / "run" / "adapter"
    assert run(capsys, "generate", *pairs, *words) == through


def test_analyze_reads_a_run_without_checkpoints(place, capsys, tmp_path):
    pruned = copied(place, tmp_path, "checkpoints")
    out = run(capsys, "analyze", "--model", place / "lm", "--adapters", pruned)
    assert "adapters (LoRA), 1 checkpoint" in out


def test_a_run_without_a_result_gives_its_best_else_its_newest_checkpoint(place, tmp_path):
    unfinished = copied(place, tmp_path, "adapter")
    assert files.find(unfinished).tensors.parent == unfinished / "best"
    assert "its best was read; it also has checkpoints/" in weft.inspect(unfinished).notes[0]
    shutil.rmtree(unfinished / "best")
    newest = unfinished / "checkpoints" / "checkpoint-6"
    newest.rename(newest.with_name("checkpoint-10"))  # after 3 by number, not as text
    (unfinished / "checkpoints" / "checkpoint-12").mkdir()  # nothing in it yet
    assert files.find(unfinished).tensors.parent.name == "checkpoint-10"
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(weft.CheckpointError, match=r"a run of weft train that has no adapter yet"):
        weft.load(base(place), unfinished)


def test_an_adapter_beside_a_run_record_is_itself(place, tmp_path):
    """Saved into the directory of a run, it is not mistaken for the run."""
    model = base(place)
    weft.attach(model, weft.DoRA(r=2))
    target = copied(place, tmp_path)
    weft.save(model, target)
    assert weft.inspect(target).method == "DoRA" and not weft.inspect(target).notes


def test_a_directory_with_an_adapter_inside_that_is_no_run_is_refused(place, tmp_path):
    shutil.copytree(place / "run" / "adapter", tmp_path / "some" / "adapter")
    with pytest.raises(weft.CheckpointError, match=r"has no adapter_model.safetensors; it holds"):
        weft.inspect(tmp_path / "some")


def test_a_damaged_result_is_refused_and_nothing_else_is_read_in_its_place(place, tmp_path):
    damaged = copied(place, tmp_path)
    file = damaged / "adapter" / TENSORS
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(weft.CheckpointError, match="no readable safetensors file"):
        weft.load(base(place), damaged)
