"""The report as Markdown, with pictures as separate files."""

from __future__ import annotations

from collections.abc import Sequence

from .document import Code, Fold, Items, Part, Picture, Section, Table

_SPECIAL = str.maketrans({char: "\\" + char for char in "\\|*_`<["})


def markdown(heading: str, sections: Sequence[Section]) -> str:
    """Returns the Markdown text."""
    blocks = [f"# {_escape(heading)}"]
    for section in sections:
        blocks.append(f"## {_escape(section.title)}")
        blocks += [_block(part) for part in section.parts]
    return "\n\n".join(blocks) + "\n"


def _block(part: Part) -> str:
    if isinstance(part, Table):
        return _table_markdown(part)
    if isinstance(part, Picture):
        return f"![{_escape(part.caption)}]({part.file})\n\n{_escape(part.caption)}"
    if isinstance(part, Items):
        return "\n".join(f"- {_escape(line)}" for line in part.lines)
    if isinstance(part, Code):
        return f"```console\n$ {part.text}\n```"
    if isinstance(part, Fold):
        return f"### {_escape(part.title)}\n\n{_table_markdown(part.table)}"
    return _escape(part)


def _table_markdown(table: Table) -> str:
    rules = ["---" if number in table.words else "---:" for number in range(len(table.header))]
    lines = [[_escape(cell) for cell in table.header], rules]
    for number, row in enumerate(table.rows):
        cells = [_escape(cell) for cell in row]
        lines.append([f"**{cells[0]}**", *cells[1:]] if number in table.strong else cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    """Escapes Markdown and puts the text on one line."""
    return " ".join(text.split()).translate(_SPECIAL)
