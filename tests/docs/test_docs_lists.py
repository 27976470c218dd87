"""The lists of methods in the documentation are those of the code; a method needs no edit of them."""

import shutil
import sys

import docs_lists
import docs_tables
import pytest

import weft
from weft.methods import METHODS


@pytest.mark.parametrize("path", docs_lists.PAGES, ids=lambda path: path.name)
def test_lists_are_up_to_date(path):
    text = path.read_text(encoding="utf-8")
    assert docs_lists.BLOCK.search(text), "the markers of the list are missing"
    assert docs_lists.filled(text) == text, "run `make docs-tables`"


def test_every_method_is_in_one_family():
    listed = [method for methods in docs_lists.members().values() for method in methods]
    assert sorted(listed) == sorted(METHODS)


def test_a_page_without_a_family_is_refused_with_the_line_to_write(monkeypatch, tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "lora.md").write_text("# LoRA\n")
    monkeypatch.setattr(docs_lists, "DOCS", tmp_path)
    with pytest.raises(KeyError, match=r"lora\.md: write <!-- family: NAME --> below its title"):
        docs_lists.family("LoRA")


@pytest.mark.parametrize("name", METHODS)
def test_a_row_of_the_readme_calls_the_method_with_its_defaults(name):
    call, *_ = docs_lists.row(name)
    assert eval(call, {"weft": weft}) == METHODS[name]()  # noqa: S307


def test_a_page_without_a_row_is_refused_with_the_line_to_write(monkeypatch, tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "lora.md").write_text("# LoRA\n\n<!-- row: weft.LoRA() | r -->\n")
    monkeypatch.setattr(docs_lists, "DOCS", tmp_path)
    with pytest.raises(KeyError, match=r"lora\.md: write <!-- row: weft\.LoRA\(\.\.\.\) \| WHAT"):
        docs_lists.row("LoRA")


def test_one_run_writes_the_lists_and_the_tables_made_from_them(monkeypatch, tmp_path):
    """With a list that is behind, the index of the reference has the new entry after one run."""
    docs = tmp_path / "docs"
    shutil.copytree(docs_tables.DOCS / "reference", docs / "reference")
    for name, place in (("DOCS", docs), ("ROOT", tmp_path)):
        monkeypatch.setattr(docs_tables, name, place)
    monkeypatch.setattr(docs_lists, "ROOT", tmp_path)
    page, index = (docs / "reference" / name for name in ("methods.md", "index.md"))
    monkeypatch.setattr(docs_lists, "PAGES", (page,))
    monkeypatch.setattr(sys, "argv", ["docs_tables.py"])
    wanted = page.read_text(encoding="utf-8"), index.read_text(encoding="utf-8")
    page.write_text(wanted[0].replace("\n::: weft.VeRA\n", ""), encoding="utf-8")
    index.write_text(wanted[1].replace(", [`weft.VeRA`][weft.VeRA]", ""), encoding="utf-8")
    docs_tables.main()
    assert (page.read_text(encoding="utf-8"), index.read_text(encoding="utf-8")) == wanted
