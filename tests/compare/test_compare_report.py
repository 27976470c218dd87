"""The report: one page that needs nothing else, the same as Markdown, and every run in it."""

from __future__ import annotations

import csv
import shutil
import subprocess
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparing import RUNS, Finished

from weft.compare.report import document, files, markdown, page
from weft.compare.report.comparison import Comparison, Row, Run

VOID = {"meta", "img", "br"}
CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)


class Parsed(HTMLParser):
    """Tags in their order, text, and what does not close; what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.wrong, self.sources, self.words, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [
            value
            for name, value in attrs
            if name in ("src", "href", "srcset", "data", "action", "poster")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def lost(**changes) -> Row:
    """A row of which one run failed, with a reason that must not be taken for markup."""
    runs = [
        Run(
            purpose="tune",
            lr=1e-2,
            seed=1000,
            steps=9,
            validation=None,
            test=None,
            seconds=1.0,
            reason="DivergedError: the loss became <nan> & more | at step 4",
        )
    ]
    given = {
        "label": "LoRA targets=['a|b']",
        "config": {},
        "tried": {1e-2: None},
        "scores": [None] * 3,
        "runs": runs,
        "reason": "every learning rate failed",
    }
    return Row(**{**given, **changes})


def found_with(rows: list[Row], **settings) -> Comparison:
    given = {
        "budget": "steps",
        "steps": 9,
        "batch": 4,
        "head_lr": 1e-2,
        "warm_up": 0.1,
        "weight_decay": 0.0,
        **settings,
    }
    return Comparison(
        task="t",
        model="m",
        rows=rows,
        seeds=3,
        settings=given,
        sizes={"train": 30, "test": 9},
        classes="ab",
        head=["head"],
        device="x",
        versions={"weft": "1"},
        notes=["a note"],
    )


@pytest.fixture(scope="module")
def parsed(finished: Finished) -> Parsed:
    return Parsed((finished.out / files.PAGE).read_text(encoding="utf-8"))


def test_the_page_parses_and_fetches_nothing(parsed: Parsed, finished: Finished) -> None:
    assert (parsed.open, parsed.wrong) == ([], [])
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert parsed.sources
    assert all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    text = (finished.out / files.PAGE).read_text(encoding="utf-8")
    assert not [
        mark for mark in ("http://", "https://", "url(", "@import", "//cdn") if mark in text
    ]


def test_the_page_has_the_five_pictures_that_lie_beside_it(
    parsed: Parsed, finished: Finished
) -> None:
    inside = [b64decode(source.partition(",")[2]) for source in parsed.sources]
    names = ["scores.png", "step-time.png", "memory.png", "learning-rates.png", "curves.png"]
    assert inside == [(finished.out / name).read_bytes() for name in names]
    assert len(set(inside)) == 5


@pytest.mark.parametrize("name", [files.PAGE, files.MARKDOWN])
def test_the_report_says_what_the_json_holds(finished: Finished, name: str) -> None:
    raw = (finished.out / name).read_text(encoding="utf-8")
    text = Parsed(raw).text if name == files.PAGE else raw.replace("\\", "")
    data = finished.json
    for row in data["rows"]:
        assert row["method"] in text
        assert f"{100 * row['score_mean']:.1f} ±" in text
        assert f"{row['trainable']:,}" in text
    for said in (
        data["recommendation"]["why"],
        "budget: equal steps, 96 steps of 12",
        f"weft {data['versions']['weft']}",
        "--methods lora:r=3:alpha=5,bitfit",
        "Python 3.",
    ):
        assert said in text


def test_every_run_is_in_the_report_and_in_runs_csv(finished: Finished, parsed: Parsed) -> None:
    with (finished.out / files.RUNS).open(encoding="utf-8", newline="") as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == RUNS
    scored = {
        (run["method"], int(run["seed"])): float(run["test"])
        for run in runs
        if run["purpose"] == "final"
    }
    assert scored == {
        (row["method"], seed): score
        for row in finished.json["rows"]
        for seed, score in enumerate(row["scores"])
    }
    assert all(run["test"] == "" for run in runs if run["purpose"] == "tune")
    assert {run["steps"] for run in runs} == {"96"}
    assert parsed.tags.count("details") == 2
    for run in runs:
        assert f" {run['seed']} 96 {100 * float(run['validation']):.1f} " in parsed.text


def test_failed_runs_are_shown_with_their_reason_and_unfolded() -> None:
    found, origin = (
        found_with([lost()]),
        document.Origin(command="weft", date="d", machine="m", versions={}),
    )
    sections = document.document(found, origin, [])
    html = page.page("t", sections, {})
    there = Parsed(html)
    assert (there.open, there.wrong) == ([], [])
    assert "<details open>" in html
    assert (
        "LoRA targets=['a|b'], lr 1e-2, seed 1000, tuning: "
        "DivergedError: the loss became <nan> & more | at step 4."
    ) in there.text
    assert "LoRA targets=['a|b'] failed: every learning rate failed." in there.text
    assert "No ranking: only 0 of 1 rows have all scores." in there.text
    text = markdown.markdown("t", sections)
    assert "### LoRA targets=\\['a\\|b'\\]: 1 runs, 1 failed".replace("\\]", "]") in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(
        line.replace("\\|", "").count("|") in (10, 13) for line in tables
    )  # nine columns, or twelve


def test_what_has_no_score_gets_no_picture_and_an_old_one_goes(tmp_path: Path) -> None:
    (tmp_path / "scores.png").write_bytes(b"old")
    written = files.write_report(found_with([lost()]), tmp_path, "weft compare")
    assert not [name for name in written if name.endswith(".png")]
    assert not list(tmp_path.glob("*.png"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(written)


def long_words(finished: Finished, tmp_path: Path) -> Path:
    """The finished page with names and commands that are longer than a phone is wide."""
    html = (finished.out / files.PAGE).read_text(encoding="utf-8")
    long = tmp_path / "long.html"
    long.write_text(
        html.replace("BitFit", "BitFit" + "x" * 300).replace("--methods", "--methods=" + "y" * 300),
        encoding="utf-8",
    )
    return long


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium is installed, so the page was not opened in a browser"
)
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("long", [False, True])
def test_a_browser_shows_the_page_without_scrolling_sideways(
    finished: Finished, tmp_path: Path, width: int, long: bool
) -> None:
    file = long_words(finished, tmp_path) if long else finished.out / files.PAGE
    assert inner_and_scrolled(file, tmp_path, width) == (width, width)


def inner_and_scrolled(file: Path, folder: Path, width: int) -> tuple[int, int]:
    """Width of the view and of what is in it, with the details unfolded.

    In a frame, since a browser's own window is never as narrow as a phone.
    """
    probe = folder / "probe.html"
    copy = folder / "copy.html"
    shutil.copy(file, copy)
    probe.write_text(
        f"""<!doctype html><body><iframe src="copy.html" style="width:{width}px;height:800px;border:0"></iframe>
<script>onload = () => {{ const d = frames[0].document; d.querySelectorAll("details").forEach(x => x.open = true);
document.title = d.documentElement.clientWidth + " " +
Math.max(d.documentElement.scrollWidth, d.body.scrollWidth) }}</script>""",
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--allow-file-access-from-files",
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    assert title, done.stderr
    inner, scrolled = map(int, title.split())
    return inner, scrolled


def test_equal_seconds_put_the_steps_of_each_row_into_the_table() -> None:
    from weft.compare.report import table

    rows = [lost(label=name, steps=steps) for name, steps in (("A", 1234), ("B", 56))]
    told = table.table_text(found_with(rows, budget="seconds", steps=None, seconds=20.0))
    assert "budget: equal wall-clock, 20 s per run" in " ".join(told.split())
    assert [
        line.split()[-1] for line in told.splitlines() if line.startswith(("method", "A ", "B "))
    ][:3] == ["steps", "1,234", "56"]
    assert "steps" not in table.scores_table(found_with([replace(rows[0])])).splitlines()[0]
