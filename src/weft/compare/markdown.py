"""The report as Markdown; pictures are files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from .document import Code, Fold, Items, Part, Picture, Section, Table

_SPECIAL = str.maketrans({char: "\\" + char for char in "\\|*_`<["})


def markdown(heading: str, sections: Sequence[Section]) -> str:
    """The whole file."""
    blocks = [f"# {_plain(heading)}"]
    for section in sections:
        blocks.append(f"## {_plain(section.title)}")
        blocks += [_block(part) for part in section.parts]
    return "\n\n".join(blocks) + "\n"


def _block(part: Part) -> str:
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Picture):
        return f"![{_plain(part.caption)}]({part.file})\n\n{_plain(part.caption)}"
    if isinstance(part, Items):
        return "\n".join(f"- {_plain(line)}" for line in part.lines)
    if isinstance(part, Code):
        return f"```console\n$ {part.text}\n```"
    if isinstance(part, Fold):
        return f"### {_plain(part.title)}\n\n{_table(part.table)}"
    return _plain(part)


def _table(table: Table) -> str:
    rules = ["---" if place in table.words else "---:" for place in range(len(table.header))]
    lines = [[_plain(cell) for cell in table.header], rules]
    for place, row in enumerate(table.rows):
        cells = [_plain(cell) for cell in row]
        lines.append([f"**{cells[0]}**", *cells[1:]] if place in table.strong else cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """What is text stays text, on one line."""
    return " ".join(text.split()).translate(_SPECIAL)
