"""`weft papers` as a user runs it: the whole of it once in a process of its own, its time and
memory measured.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from weft import papers
from weft.cli import main

pytestmark = pytest.mark.timeout(300)  # whichever test comes first waits for the whole run
STATUSES = ("reproduced", "explained", "different")
READINGS = {"both": "either way", "round": "rounded", "trunc": "truncated"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All tables: exit status, lines, JSON, processor seconds, wall seconds, peak bytes."""
    folder = tmp_path_factory.mktemp("papers")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = time.monotonic()
    with (
        (folder / "out").open("w", encoding="utf-8") as out,
        (folder / "err").open("w", encoding="utf-8") as err,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "weft", "papers", "--json", str(folder / "rows.json")],
            stdout=out,
            stderr=err,
            env=environment,
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    assert (folder / "err").read_text(encoding="utf-8") == ""
    return SimpleNamespace(
        status=process.returncode,
        lines=(folder / "out").read_text(encoding="utf-8").splitlines(),
        data=json.loads((folder / "rows.json").read_text(encoding="utf-8")),
        peak=used.ru_maxrss * unit,
        cpu=used.ru_utime + used.ru_stime,
        wall=time.monotonic() - started,
    )


def test_the_whole_run_takes_little_time_and_memory(whole):
    """Under 60 seconds on two quiet cores; processor seconds are held here, since the tests' cores
    are seldom quiet.
    """
    assert whole.cpu < 60, f"{whole.cpu:.0f} processor seconds, {whole.wall:.0f} s"
    assert whole.peak < 2 * 2**30


def test_json_has_the_rows_of_the_contract(whole):
    assert set(whole.data) == {"schema", "rows", "storage"} and whole.data["schema"] == 1
    assert [row["id"] for row in whole.data["rows"]] == [
        row.id for table in papers.tables() for row in table.rows
    ]
    for row in whole.data["rows"]:
        assert set(row) == {"id", "table", "row", "printed", "computed", "status", "reason"}
        assert row["status"] in STATUSES
        assert isinstance(row["computed"], int | float | None)
        assert all(isinstance(row[key], str) for key in ("id", "table", "row", "printed", "reason"))
        assert row["reason"], row["id"]


def test_every_row_is_reproduced_or_explained(whole):
    assert not [
        row for row in whole.data["rows"] if row["status"] not in ("reproduced", "explained")
    ]
    assert whole.status == 0


@pytest.mark.shared
def test_every_row_is_that_of_the_facts(whole, shared):
    facts = {
        row["id"]: row
        for row in json.loads((shared / "facts" / "param_counts.json").read_text(encoding="utf-8"))
    }
    assert set(facts) == {row["id"] for row in whole.data["rows"]}
    for row in whole.data["rows"]:
        fact = facts[row["id"]]
        assert (row["table"], row["row"], row["printed"]) == (
            fact["table"],
            fact["row"],
            fact["printed"],
        )
        assert row["computed"] == fact["computed"], row["id"]
        assert row["status"] == ("reproduced" if fact["matches"] else "explained"), row["id"]
        if fact["matches"]:
            assert row["reason"].startswith(READINGS[fact["printed_rounding"]]), row["id"]


def test_every_line_fits_80_columns_and_every_row_is_printed(whole):
    assert max(map(len, whole.lines)) <= 80
    printed = [
        line for line in whole.lines if line.endswith(STATUSES) and not line.endswith("status")
    ]
    assert len(printed) - 1 == 126  # and the last line
    titles = [table.title for table in papers.tables()]
    assert [line.split("] ")[1] for line in whole.lines if line.startswith("[")] == titles


def test_the_last_line_has_the_numbers_of_rows_by_status(whole):
    found = [row["status"] for row in whole.data["rows"]]
    assert whole.lines[-1] == "126 rows: " + ", ".join(
        f"{found.count(status)} {status}" for status in STATUSES
    )


def test_a_vera_file_is_its_vectors_and_at_most_4_kb(whole):
    rows = {row["id"]: row["row"] for row in whole.data["rows"]}
    held = [s for s in whole.data["storage"] if "VeRA" in rows[s["id"]]]
    assert len(held) == 9 and len(whole.data["storage"]) == 18
    for stored in held:
        assert 0 < stored["file"] - stored["values"] <= 4096, rows[stored["id"]]


def run(capsys, *words):
    status = main(["papers", *words])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_one_table_by_name_or_title_in_any_case(capsys, tmp_path):
    status, out, err = run(capsys, "--table", "DORA-2", "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    assert (status, err, [row["id"] for row in rows]) == (0, "", ["118", "119", "120"])
    assert out.endswith("3 rows: 3 reproduced, 0 explained, 0 different\n")
    again = run(capsys, "--table", "Image-text VL-BART (DoRA paper Table 2)")
    assert again == (0, out, "")


@pytest.mark.parametrize(
    ("name", "nearest", "far"),
    [
        ("vera1", "vera-1", "dora-5"),
        ("dora-table-1", "dora-1", "vera-1"),
        ("lora-33", "lora-3", "dora-4"),
        ("GLUE RoBERTa", "vera-2", "vera-1"),
        ("", "lora-3, lora-4", "none"),
        ("nothing like it", "lora-3, lora-4", "none"),
    ],
)
def test_an_unknown_table_names_the_nearest_in_one_line(capsys, name, nearest, far):
    status, out, err = run(capsys, "--table", name)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert repr(name) in err and nearest in err and far not in err


def test_a_row_made_wrong_is_reported_and_changes_the_exit_status(capsys, monkeypatch, tmp_path):
    table = papers.find_table("dora-2", papers.tables())
    wrong = dataclasses.replace(table.rows[1], printed="5.94")
    changed = dataclasses.replace(table, rows=(table.rows[0], wrong, table.rows[2]))
    monkeypatch.setattr(papers, "tables", lambda: [changed])
    status, out, _ = run(capsys, "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    assert status == 1
    assert [row["status"] for row in rows] == ["reproduced", "different", "reproduced"]
    assert "3 rows: 2 reproduced, 0 explained, 1 different" in out
