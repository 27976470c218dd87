"""The report as one self-contained HTML page: pictures and style are embedded,
nothing is fetched.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape

from .document import Code, Fold, Items, Part, Picture, Section, Table

STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: #fff; color: #1b1b1b;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem }
p, li { max-width: 46rem } ul { padding-left: 1.2rem }
.wide { overflow-x: auto; margin: .5rem 0; border: 1px solid #ddd; border-radius: 4px }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee }
th { background: #f5f5f5; vertical-align: bottom } thead th { white-space: normal; overflow-wrap: normal }
tbody th { background: none; font-weight: 400; white-space: normal; min-width: 7rem }
tbody th, td { vertical-align: top }
.words { text-align: left } tbody tr:last-child > * { border-bottom: 0 }
td.words { white-space: normal; min-width: 8rem }
tr.strong > * { background: #e8f3ec; font-weight: 600 }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem }
figure { margin: 0 } img { display: block; width: 100%; height: auto } figcaption { font-size: .875rem; color: #444 }
pre { padding: .6rem; background: #f5f5f5; border-radius: 4px; white-space: pre-wrap; font-size: .875rem }
summary { cursor: pointer; padding: .25rem 0 }
@media print { .wide { overflow: visible } }
""".strip()


def page(heading: str, sections: Sequence[Section], pictures: Mapping[str, bytes]) -> str:
    """Returns the HTML text. `pictures` has the PNG files that the sections name."""
    body = [f"<h1>{escape(heading)}</h1>"]
    for section in sections:
        body.append(f"<section>\n<h2>{escape(section.title)}</h2>")
        body += _section_html(section.parts, pictures)
        body.append("</section>")
    return (
        "\n".join(
            [
                "<!doctype html>",
                '<html lang="en">',
                "<head>",
                '<meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{escape(heading)}</title>",
                f"<style>\n{STYLE}\n</style>",
                "</head>",
                "<body>",
                "<main>",
                *body,
                "</main>",
                "</body>",
                "</html>",
            ]
        )
        + "\n"
    )


def _section_html(parts: Sequence[Part], pictures: Mapping[str, bytes]) -> list[str]:
    if parts and all(isinstance(part, Picture) for part in parts):
        return ['<div class="pictures">', *(_part_html(part, pictures) for part in parts), "</div>"]
    return [_part_html(part, pictures) for part in parts]


def _part_html(part: Part, pictures: Mapping[str, bytes]) -> str:
    if isinstance(part, Table):
        return _table_html(part, "table")
    if isinstance(part, Picture):
        data = b64encode(pictures[part.file]).decode("ascii")
        return (
            f'<figure><img alt="{escape(part.caption)}" src="data:image/png;base64,{data}">\n'
            f"<figcaption>{escape(part.caption)}</figcaption></figure>"
        )
    if isinstance(part, Items):
        return "\n".join(["<ul>", *(f"<li>{escape(line)}</li>" for line in part.lines), "</ul>"])
    if isinstance(part, Code):
        return f"<pre><code>{escape(part.text)}</code></pre>"
    if isinstance(part, Fold):
        opened = " open" if part.open else ""
        return f"<details{opened}><summary>{escape(part.title)}</summary>\n{_table_html(part.table, part.title)}\n</details>"
    return f"<p>{escape(part)}</p>"


def _table_html(table: Table, name: str) -> str:
    """The table in a box that scrolls if it is wider than the page, and can be
    reached by keyboard.
    """
    head = "".join(
        f'<th scope="col"{_words_class(table, column)}>{escape(cell)}</th>'
        for column, cell in enumerate(table.header)
    )
    rows = []
    for number, row in enumerate(table.rows):
        cells = [f'<th scope="row" class="words">{escape(row[0])}</th>']
        cells += [
            f"<td{_words_class(table, column)}>{escape(cell)}</td>"
            for column, cell in enumerate(row)
            if column
        ]
        strong = ' class="strong"' if number in table.strong else ""
        rows.append(f"<tr{strong}>{''.join(cells)}</tr>")
    return "\n".join(
        [
            f'<div class="wide" tabindex="0" role="region" aria-label="{escape(name)}"><table>',
            f"<thead><tr>{head}</tr></thead>",
            "<tbody>",
            *rows,
            "</tbody>",
            "</table></div>",
        ]
    )


def _words_class(table: Table, column: int) -> str:
    return ' class="words"' if column in table.words else ""
