"""Checkpoints that an earlier Weft wrote load, compute what they computed, and are saved again
without a change (see scripts/golden_checkpoints.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_support import CONFIG, TENSORS, read
from golden_bases import KINDS, base, logits
from safetensors.torch import load_file

import weft

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "checkpoints"
EXPECTED = load_file(FOLDER / "expected.safetensors")
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def kind_of(name: str) -> str:
    base_class = weft.inspect(FOLDER / name).base["class"]
    return next(kind for kind, (model, *_) in KINDS.items() if model == base_class)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bases_are_those_of_the_files(kind):
    torch.testing.assert_close(logits(base(kind)), EXPECTED[f"base.{kind}"], rtol=0, atol=1e-5)


def test_every_file_has_an_expected_output_and_every_listed_method_has_a_file():
    """A method that is newer than the files is in the list after its first release."""
    assert {*NAMES, *(f"base.{kind}" for kind in KINDS)} == set(EXPECTED)
    listed = (FOLDER / "methods.txt").read_text(encoding="utf-8").split()
    assert len(listed) >= 14 and set(listed) <= set(weft.methods.METHODS)
    assert {weft.inspect(FOLDER / name).method for name in NAMES} == set(listed)


@pytest.mark.parametrize("name", NAMES)
def test_an_old_checkpoint_loads_and_computes_the_same(name):
    model = base(kind_of(name))
    before = logits(model)
    adapter = weft.load(model, FOLDER / name)
    found = logits(model)
    assert adapter.load_report.ok and not adapter.load_report.notes
    torch.testing.assert_close(found, EXPECTED[name], rtol=0, atol=1e-5)
    assert float((found - before).abs().max()) > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_an_old_checkpoint_is_saved_again_with_the_same_tensors(name, tmp_path):
    model = base(kind_of(name))
    weft.load(model, FOLDER / name)
    weft.save(model, tmp_path / name, projections=name == "vera_projections")
    old, new = read(FOLDER / name)[0], read(tmp_path / name)[0]
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    configs = [json.loads((folder / name / CONFIG).read_text()) for folder in (FOLDER, tmp_path)]
    native = [config["peft_type"].startswith("WEFT_") for config in configs]
    assert native[0] == native[1]
    assert native[0] or configs[0]["peft_type"] == configs[1]["peft_type"]
    assert (tmp_path / name / TENSORS).is_file()
