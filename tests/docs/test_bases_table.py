"""The table of docs/bases.md says what the tests said, and a test whose finding changes fails."""

import json

import docs_bases
import pytest

import bases_record


@pytest.fixture
def records(monkeypatch, tmp_path):
    monkeypatch.setattr(bases_record, "RECORDS", tmp_path)
    monkeypatch.setattr(docs_bases, "RECORDS", tmp_path)
    monkeypatch.setenv("WEFT_RECORD_BASES", "1")
    return tmp_path


def test_rows_are_written_once_each_and_become_the_table(records):
    for _ in range(2):
        bases_record.exact("thing", "LoRA", "torch")
        bases_record.refused("thing", "DoRA", "it has no rows", "torch")
        bases_record.untried("other", "merge", "needs a GPU", "torch", needs="CUDA")
    rows = json.loads((records / "bases_table.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in rows] == ["LoRA", "DoRA", "merge"]
    lines = docs_bases.bases_block().splitlines()
    version = rows[0]["version"]
    assert lines[0] == "| base | package | LoRA | DoRA | merge |"
    assert lines[2] == f"| thing | torch {version} | yes | no (1) | – |"
    assert lines[3] == f"| other (needs CUDA) | torch {version} | – | – | – (2) |"
    assert lines[5:] == ["1. it has no rows.", "2. needs a GPU."]


def test_a_test_that_finds_something_else_than_the_record_fails(records, monkeypatch):
    bases_record.exact("thing", "LoRA", "torch")
    monkeypatch.delenv("WEFT_RECORD_BASES")
    bases_record.exact("thing", "LoRA", "torch")
    with pytest.raises(AssertionError, match="does not say thing, LoRA: refused"):
        bases_record.refused("thing", "LoRA", "it is odd", "torch")
    with pytest.raises(AssertionError, match="does not say thing, VeRA"):
        bases_record.exact("thing", "VeRA", "torch")
