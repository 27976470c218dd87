"""The lists of methods in the documentation are those of the code; a method needs no edit of them."""

import docs_lists
import pytest

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
