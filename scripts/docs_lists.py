"""Writes the lists of methods in README.md, docs/overview.md, docs/from-peft.md,
docs/reference/methods.md and mkdocs.yml.

Usage: python scripts/docs_lists.py     (make docs-tables runs it too)

Below the title of a method's page, docs/methods/<name>.md, are two comments: `<!-- family: NAME -->`
and `<!-- row: CALL | WHAT TRAINS | NUMBERS PER LAYER -->`, its row in the README. So a new method needs
no edit of these files. <name> is the name of the class in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from weft.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FAMILIES = {
    "LoRA-based": "a low-rank update of each weight",
    "Mapping-based": "a few parameters; fixed random matrices turn them into an update",
    "Adapter-based": "small nonlinear networks in or next to the layers",
    "Prompt-based": "virtual positions; no weight changes",
    "Tensors of the model itself": "tensors that the model already has",
}
BLOCK = re.compile(
    r"(?P<open>[ ]*(?:<!-- |# )list: (?P<name>[a-z ]+?)(?: -->)?\n)(?P<text>.*?)"
    r"(?P<close>[ ]*(?:<!-- |# )/list)",
    re.DOTALL,
)


def page(method: str) -> Path:
    """Returns the page of a method."""
    return DOCS / "methods" / f"{method.lower()}.md"


def family(method: str) -> str:
    """Returns the family on the method's page. Raises KeyError with the line to write."""
    found = re.search(r"^<!-- family: (.+?) -->$", page(method).read_text("utf-8"), re.MULTILINE)
    if found is None or found[1] not in FAMILIES:
        raise KeyError(
            f"docs/methods/{method.lower()}.md: write <!-- family: NAME --> below its title, with "
            f"one of {list(FAMILIES)}"
        )
    return found[1]


def row(method: str) -> list[str]:
    """Returns the method's row in the README: how it is called, what trains, and numbers per layer.

    Raises KeyError with the line to write.
    """
    found = re.search(r"^<!-- row: (.+?) -->$", page(method).read_text("utf-8"), re.MULTILINE)
    cells = [] if found is None else found[1].split(" | ")
    if len(cells) != 3:
        raise KeyError(
            f"docs/methods/{method.lower()}.md: write <!-- row: weft.{method}(...) | WHAT TRAINS | "
            "NUMBERS PER LAYER --> below its title"
        )
    return cells


def heading(method: str) -> str:
    """Returns the first word of the page's title: "Bottleneck" of "# Bottleneck adapters"."""
    return page(method).read_text("utf-8").splitlines()[0].split()[1]


def members() -> dict[str, list[str]]:
    """Returns the methods of every family, in the order of METHODS."""
    of = {method: family(method) for method in METHODS}
    return {name: [method for method in METHODS if of[method] == name] for name in FAMILIES}


def overview() -> str:
    """Returns the table of all methods by family."""
    lines = ["", "| family | what is trained | methods |", "| --- | --- | --- |"]
    for name, methods in members().items():
        links = ", ".join(f"[{heading(m)}](methods/{m.lower()}.md)" for m in methods)
        lines.append(f"| {name} | {FAMILIES[name]} | {links} |")
    return "\n".join([*lines, "", ""])


def method_table() -> str:
    """Returns the README's table of the methods."""
    lines = ["", "| method | what trains, per adapted layer | numbers |", "|---|---|---|"]
    for method in (method for methods in members().values() for method in methods):
        call, trains, numbers = row(method)
        link = f"[`{call}`](docs/methods/{method.lower()}.md)"
        lines.append(f"| {link} | {trains} | {numbers} |")
    return "\n".join([*lines, "", ""])


def own_layout() -> str:
    """Returns the table of the methods whose files have Weft's own layout, with their fields."""
    from docs_tables import abilities

    lines = ["", "| method | fields |", "| --- | --- |"]
    for method, cls in METHODS.items():
        if abilities(method)["file"] == "Weft's own":
            names = ", ".join(f"`{field.name}`" for field in fields(cls))
            lines.append(f"| `weft.{method}` | {names} |")
    return "\n".join([*lines, "", ""])


def navigation() -> str:
    """Returns the pages of the methods as entries of mkdocs.yml."""
    lines = []
    for name, methods in members().items():
        lines.append(f"      - {name}:")
        lines += [f"          - {heading(m)}: methods/{m.lower()}.md" for m in methods]
    return "\n".join([*lines, ""])


def reference() -> str:
    """Returns the entries of the API reference."""
    names = [method for methods in members().values() for method in methods]
    return "".join(f"\n::: weft.{name}\n" for name in names) + "\n"


LISTS: dict[str, Callable[[], str]] = {
    "all methods": overview,
    "method table": method_table,
    "own layout": own_layout,
    "navigation": navigation,
    "reference": reference,
}
PAGES = (
    ROOT / "README.md",
    DOCS / "overview.md",
    DOCS / "from-peft.md",
    DOCS / "reference" / "methods.md",
    ROOT / "mkdocs.yml",
)


def filled(text: str) -> str:
    """Returns the text of a page with up-to-date lists."""
    return BLOCK.sub(lambda m: f"{m['open']}{LISTS[m['name']]()}{m['close']}", text)


def main() -> None:
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
