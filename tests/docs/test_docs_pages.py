"""The pages: tables are what the code says, every method has one, all are in the navigation, links
lead somewhere.
"""

import dataclasses
import re

import docs_tables
import pytest
from documents import ALL, DOCS, PAGES, ROOT, named, prose

from weft import papers
from weft.methods import METHODS

LISTED = {name: DOCS / "methods" / f"{name.lower()}.md" for name in (*METHODS, *docs_tables.COMING)}
FRESH = "the tables are not those of the code: run `make docs-tables`"


def unchecked(name):
    """Rebuilding the papers takes longer; what autograd keeps depends on the releases that the
    block names.
    """
    return name.startswith("papers ") or (
        name == "memory"
        and docs_tables.versions() not in (DOCS / "numbers.md").read_text(encoding="utf-8")
    )


def test_generated_tables_are_what_the_code_says():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert docs_tables.filled(text, keep=unchecked) == text, f"{named(page)}: {FRESH}"


@pytest.mark.slow
def test_rebuilt_counts_are_what_the_code_says():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert docs_tables.filled(text, keep=lambda name: not name.startswith("papers ")) == text, (
            f"{named(page)}: {FRESH}"
        )


def test_every_printed_figure_stands_on_the_page_of_its_method():
    rows = [(table.name, row) for table in papers.tables() for row in table.rows if row.methods]
    assert len(rows) > 120
    for name, row in rows:
        method = row.methods[0]["method"]
        text = LISTED[method].read_text(encoding="utf-8")
        shown = next(
            (
                line
                for line in text.splitlines()
                if line.startswith(f"| {name} | {row.row} | {row.printed} ")
            ),
            None,
        )
        assert shown is not None, f"{row.id} {row.row}: {FRESH}"
        if row.ours is not None and method not in docs_tables.COMING:
            assert f"{row.ours:,}" in shown or f"{row.ours:.4f}" in shown, (row.id, shown)


@pytest.mark.parametrize("name", LISTED)
def test_a_method_has_a_page_that_says_all_of_it(name):
    text = LISTED[name].read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == [
        "What trains, and where it starts",
        "What it costs",
        "When to take it, and when not",
        "What the papers report",
        "What we measured",
        "How to call it",
        "Under other names",
    ]
    for said in (f"weft.{name}(", "**Inference.**", "Memory", "Take it", "Do not take"):
        assert said in text, said
    assert [f"{kind} {name}" for kind in ("cost", "abilities", "papers", "measured", "fields")] == [
        m["name"] for m in docs_tables.BLOCK.finditer(text)
    ]


def test_every_method_stands_in_the_overview_and_no_page_is_left_over():
    overview = (DOCS / "overview.md").read_text(encoding="utf-8")
    for page in LISTED.values():
        assert f"(methods/{page.name})" in overview, page.name
    assert set(LISTED.values()) == set((DOCS / "methods").glob("*.md"))


def test_the_navigation_lists_every_page():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"([\w/-]+\.md)$", text.split("\nnav:")[1], re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_the_site_fetches_nothing():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings and "http" not in settings
    for page in PAGES:
        assert not re.search(r"https?://", prose(page)), named(page)


def test_the_readmes_first_screen_has_the_picture_and_the_command_that_makes_it():
    first = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    command, picture = first.index("$ make demo"), first.index('src="docs/demo-scores.png"')
    assert command < picture < 1000 and (ROOT / "docs" / "demo-scores.png").is_file()
    assert len(first.splitlines()) < 26


def slug(heading):
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower()).strip())


@pytest.mark.parametrize("page", ALL, ids=named)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(((?!http)[^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists() or (page.name == "adding-a-method.md" and (ROOT / path).exists()), (
            target
        )
        if anchor:
            assert anchor in map(
                slug, re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            ), target


@pytest.mark.parametrize(
    "name",
    ["LoraConfig", "VeraConfig", "AdaLoraConfig", "PrefixTuningConfig", "PromptTuningConfig"],
)
def test_every_field_of_peft_is_named(name):
    import peft

    text = (DOCS / "from-peft.md").read_text(encoding="utf-8")
    sections = {part.splitlines()[0]: part for part in text.split("\n## ")[1:]}
    section = next(part for heading, part in sections.items() if name in heading)
    missing = [
        f.name for f in dataclasses.fields(getattr(peft, name)) if f"`{f.name}`" not in section
    ]
    assert not missing, f"docs/from-peft.md, {name}: say what becomes of {missing}"


@pytest.mark.parametrize("name", METHODS)
def test_every_field_of_ours_is_named_there_too(name):
    text = (DOCS / "from-peft.md").read_text(encoding="utf-8")
    assert [f.name for f in dataclasses.fields(METHODS[name]) if f"`{f.name}`" not in text] == []
    assert f"weft.{name}" in text
