"""The pages: tables are what the code says, every method has one, all are in the navigation, links
lead somewhere.
"""

import ast
import dataclasses
import inspect
import re
import sys

import bench_table
import docs_fields
import docs_reference
import docs_tables
import griffe
import pytest
from documents import ALL, DOCS, PAGES, ROOT, named, prose

import weft
import weft.training
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
        "What is trained",
        "What it costs",
        "When to use it, and when not",
        "What the papers report",
        "What we measured",
        "Example",
        "In other libraries",
    ]
    for said in (f"weft.{name}(", "**Inference.**", "Memory", "Use it", "Do not use"):
        assert said in text, said
    assert [f"{kind} {name}" for kind in ("cost", "abilities", "papers", "measured", "fields")] == [
        m["name"] for m in docs_tables.BLOCK.finditer(text)
    ]


def test_every_method_stands_in_the_overview_and_no_page_is_left_over():
    overview = (DOCS / "overview.md").read_text(encoding="utf-8")
    for page in LISTED.values():
        assert f"(methods/{page.name})" in overview, page.name
    assert set(LISTED.values()) == set((DOCS / "methods").glob("*.md"))


def test_every_public_name_has_one_entry_in_the_reference():
    listed = [name for names in docs_tables.entries().values() for name in names]
    public = [f"weft.{name}" for name in weft.__all__]
    public += [f"weft.training.{name}" for name in weft.training.__all__]
    assert sorted(listed) == sorted(public)


@pytest.fixture(scope="module")
def package():
    """What mkdocstrings reads."""
    extensions = griffe.load_extensions(str(ROOT / "scripts" / "docs_reference.py"))
    return griffe.load("weft", search_paths=[str(ROOT / "src")], extensions=extensions)


def test_every_entry_of_the_reference_says_something(package):
    for path in (path for paths in docs_tables.entries().values() for path in paths):
        entry = package[path.removeprefix("weft.")]
        module, _, name = path.rpartition(".")
        found = getattr(sys.modules[module], name)
        assert (entry.is_class, entry.is_function) == (
            inspect.isclass(found),
            inspect.isfunction(found),
        ), path
        assert entry.docstring is not None and len(entry.docstring.value) > 20, path


@pytest.mark.parametrize("name", METHODS)
def test_the_reference_of_a_method_has_its_fields_and_defaults(name, package):
    text = package[name].docstring.value
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? \| (.+) \|$", text, re.MULTILINE)
    fields = dataclasses.fields(METHODS[name])
    assert sorted(row[0] for row in rows) == sorted(f.name for f in fields)
    written = {field: ast.literal_eval(default) for field, default, _ in rows if default}
    assert written == {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def test_placeholders_in_docstrings_are_not_taken_for_html(package):
    text = "A `<b>` and <module>.<tensor>, 2 < 3.\n\n    W <b>"
    assert docs_reference.escaped(text) == (
        "A `<b>` and &lt;module>.&lt;tensor>, 2 < 3.\n\n    W <b>"
    )
    for name in (name for names in docs_tables.entries().values() for name in names):
        plain = re.sub(r"`[^`]*`|^    .*$", "", package[name[5:]].docstring.value, flags=re.M)
        assert not re.search(r"<\w", plain), name


def test_a_string_below_a_field_documents_it_and_one_without_is_named():
    @dataclasses.dataclass
    class Base:
        seed: int = 0
        """Of the base."""

    @dataclasses.dataclass
    class Own(Base):
        width: int = 4
        """How wide
        it is."""
        r: int = 8

    below = docs_fields.written(Own)
    assert below == {"seed": "Of the base.", "width": below["width"]} and len(below) == 2
    assert docs_fields.meaning("Own", "width", below["width"]) == "How wide it is."
    assert docs_fields.meaning("Own", "r") == docs_fields.MEANINGS["r"]
    with pytest.raises(KeyError, match=r"Own\.depth: write what it means"):
        docs_fields.meaning("Own", "depth")


def test_the_navigation_lists_every_page():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"([\w/-]+\.md)$", text.split("\nnav:")[1], re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_the_site_fetches_nothing():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings and "http" not in settings
    for page in PAGES:
        assert not re.search(r"https?://", prose(page)), named(page)


def test_the_readmes_first_screen_is_for_somebody_who_knows_transformers_and_peft():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    head, code = text.split("```python\n")[:2]
    code = code.split("```")[0]
    assert len(head.splitlines()) < 8 and len(code.splitlines()) <= 30
    steps = (
        "from_pretrained(",
        "weft.attach(",
        "Trainer(",
        ".train()",
        "weft.audit(",
        "weft.save(",
    )
    places = [code.index(step) for step in (*steps, "weft.load(", "weft.use(")]
    assert places == sorted(places)
    order = ("SFTTrainer", "plain loop", "`weft compare`", "What it costs")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    found = [next(i for i, h in enumerate(headings) if part in h) for part in order]
    assert found == sorted(found)


def test_the_readme_has_the_picture_and_the_command_that_makes_it():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command, picture = text.index("$ make demo"), text.index('src="docs/demo-scores.png"')
    table = text.index("<!-- table:")
    assert command < picture < table < command + 1500
    assert (ROOT / "docs" / "demo-scores.png").is_file()


def test_the_readme_shows_five_rows_of_the_benchmark_wins_and_losses():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split(bench_table.START)[1].split(bench_table.END)[0]
    rows = re.findall(r"^\| (.+?) \|.*\| (\w+) \|$", block, re.MULTILINE)
    assert len(rows) == 5
    full = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert all(row in full for row, _ in rows)


def test_files_that_the_map_of_the_code_names_exist():
    for page in (DOCS / "internals.md", ROOT / "CONTRIBUTING.md"):
        named_files = re.findall(
            r"`((?:src|tests|scripts|benchmarks|docs)/[\w./]+)`", page.read_text()
        )
        assert len(named_files) > 5
        assert [path for path in named_files if not (ROOT / path).exists()] == [], page.name


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
