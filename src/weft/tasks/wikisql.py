"""`wikisql:DIR`: WikiSQL, questions about a table to SQL, as in the LoRA paper's GPT-3 table.

Read are the authors' files (train.jsonl with train.tables.jsonl, and dev, test likewise) or the
hub's rows, which hold the table. Context = schema and question, target = SQL (LoRA paper, appendix
C; its exact words are unknown, these are ours):

    Table: "Player" (text), "No." (real)
    Question: Who wears 42?
    SQL: SELECT "Player" FROM table WHERE "No." = '42' AND ...

A name is quoted with ", a value with ', both doubled inside; a column name that a table has twice
gets " (2)" and so on, so that the SQL can be read back exactly. Logical-form accuracy is that of
the authors' evaluate.py: select and aggregation are equal, and so are the conditions as a set,
values compared as lower-cased text. What cannot be read back is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import WeftError
from .files import Row, columns, find_file, find_splits, format_of, hub_rows, read_lines, read_rows
from .generation import GenerationTask, Record, Report, Sample, references_only

HUB = "Salesforce/wikisql"
SPLITS = {"train": ("train",), "validation": ("dev", "validation"), "test": ("test",)}
AGGREGATIONS = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<", "OP")
GENERATION = {"num_beams": 1, "max_new_tokens": 128, "do_sample": False}
_NAME, _VALUE = r'"((?:[^"]|"")*)"', r"'((?:[^']|'')*)'"
_SELECT = re.compile(
    rf"\s*SELECT\s+(?:(MAX|MIN|COUNT|SUM|AVG)\s+)?{_NAME}\s+FROM\s+table(?=\s|;|$)", re.IGNORECASE
)
_CONDITION = re.compile(rf"\s+(WHERE|AND)\s+{_NAME}\s*(=|>|<|OP)\s*{_VALUE}", re.IGNORECASE)


@dataclass(frozen=True)
class Query:
    """A logical form: the column, its aggregation, and conditions (column, operator, value);
    columns by name.
    """

    sel: str
    agg: int
    conds: frozenset[tuple[str, int, str]]


def load(source: Path | str = HUB) -> GenerationTask:
    """From a folder, or by its name on the hub. Raises WeftError: no such file or table, or a row
    that is no query.
    """
    name = f"wikisql:{source}"
    held: dict[str, list[tuple[str, str]]] = {}
    for split, (rows, tables, where) in (
        _local(source, name) if isinstance(source, Path) else _hub(source)
    ).items():
        columns(rows, where, "question", "sql")
        held[split] = [
            (
                prompt_of(row["question"], header, types),
                render(row["sql"], header, f"{where}, row {i}"),
            )
            for i, row in enumerate(rows, start=1)
            for header, types in [_schema(row, tables, f"{where}, row {i}")]
        ]
    samples: list[Sample] = [
        {"prompt": prompt, "completion": sql} for prompt, sql in held.pop("train", [])
    ]
    records: dict[str, list[Record]] = {
        split: [{"prompt": prompt, "references": [sql]} for prompt, sql in pairs]
        for split, pairs in held.items()
    }
    return GenerationTask(
        name, samples, records, GENERATION, "logical-form accuracy", score, right=is_right
    )


def _local(folder: Path, name: str) -> dict[str, tuple[list[Row], dict[str, Row], str]]:
    found = {}
    for split, path in find_splits(folder, SPLITS, name).items():
        found[split] = (read_rows(path), _tables(path), str(path))
    return found


def _tables(path: Path) -> dict[str, Row]:
    """The tables of dev.jsonl from dev.tables.jsonl beside it; empty where there is none."""
    stem = path.name.removesuffix(".gz").removesuffix(format_of(path))
    beside = find_file(path.parent, [f"{stem}.tables"])
    if beside is None:
        return {}
    rows = read_rows(beside)
    columns(rows, str(beside), "id", "header")
    return {row["id"]: row for row in rows}


def _hub(source: str) -> dict[str, tuple[list[Row], dict[str, Row], str]]:
    rows = {split: hub_rows(source, None, split) for split in SPLITS}
    return {split: (found, {}, f"{source}, {split}") for split, found in rows.items() if found}


def _schema(row: Row, tables: Mapping[str, Row], where: str) -> tuple[list[str], list[str]]:
    """Column names, made unlike each other, and types ([] where unknown)."""
    table = row.get("table") or tables.get(row.get("table_id", ""))
    if table is None:
        raise WeftError(
            f"{where}: its table {row.get('table_id')!r} is not there; NAME.jsonl needs "
            "NAME.tables.jsonl "
            "beside it."
        )
    names: dict[str, str] = {}  # by their lower case: key words and names are read in any case
    for name in table["header"]:
        number, unlike = 2, name
        while unlike.lower() in names:
            unlike, number = f"{name} ({number})", number + 1
        names[unlike.lower()] = unlike
    return list(names.values()), list(table.get("types") or [])


def prompt_of(question: str, header: Sequence[str], types: Sequence[str] = ()) -> str:
    """Schema and question, up to where the SQL begins."""
    known = types if len(types) == len(header) else [""] * len(header)
    schema = ", ".join(
        _name(name) + (f" ({kind})" if kind else "")
        for name, kind in zip(header, known, strict=True)
    )
    return f"Table: {schema}\nQuestion: {' '.join(question.split())}\nSQL: "


def render(sql: Mapping[str, Any], header: Sequence[str], where: str = "sql") -> str:
    """{sel, agg, conds} as SQL. Raises WeftError: a column, aggregation or operator that is not
    there.
    """
    try:
        call = f"{_at(AGGREGATIONS, sql['agg'])} ".lstrip()
        parts = [
            f"{_name(_at(header, column))} {_at(OPERATORS, operator)} {_quoted(value)}"
            for column, operator, value in _conds(sql)
        ]
        selected = _name(_at(header, sql["sel"]))
    except (KeyError, IndexError, TypeError, ValueError):
        raise WeftError(
            f"{where}: {json.dumps(sql, default=str)[:120]} is no query on {len(header)} columns."
        ) from None
    return f"SELECT {call}{selected} FROM table" + (
        f" WHERE {' AND '.join(parts)}" if parts else ""
    )


def _at(names: Sequence[str], place: Any) -> str:
    if int(place) < 0:
        raise IndexError
    return names[int(place)]


def _conds(sql: Mapping[str, Any]) -> list[tuple[Any, Any, Any]]:
    """As the authors' files have them, a list of three, or as the hub has, three lists."""
    conds = sql["conds"]
    if isinstance(conds, Mapping):
        return list(
            zip(conds["column_index"], conds["operator_index"], conds["condition"], strict=True)
        )
    return [(column, operator, value) for column, operator, value in conds]


def _name(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _quoted(value: Any) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def parse(text: str) -> Query | None:
    """Read SQL back, columns by name; None for what is no SQL of this form. Key words may be in any
    case.
    """
    start = _SELECT.match(text)
    if start is None:
        return None
    place, conds = start.end(), list[tuple[str, int, str]]()
    while (found := _CONDITION.match(text, place)) is not None:
        if (found[1].upper() == "WHERE") != (not conds):
            return None
        value = found[4].replace("''", "'").lower()
        conds.append((_column(found[2]), OPERATORS.index(found[3].upper()), value))
        place = found.end()
    if text[place:].strip().rstrip(";").strip():
        return None
    return Query(_column(start[2]), AGGREGATIONS.index((start[1] or "").upper()), frozenset(conds))


def _column(quoted: str) -> str:
    return quoted.replace('""', '"').lower()


def score(outputs: Sequence[str], records: Sequence[Record]) -> Report:
    """The share of outputs with the reference's logical form, in [0, 1]. What follows in further
    lines is left out.
    """
    right = sum(is_right(output, record) for output, record in zip(outputs, records, strict=True))
    return Report({"logical-form accuracy": right / len(records)})


def is_right(output: str, record: Record) -> bool:
    """The output, or its first line, is read back as the logical form of a reference."""
    found = parse(output) or parse(output.strip().partition("\n")[0])
    return found is not None and found in [parse(reference) for reference in record["references"]]


def read_references(path: Path) -> list[Record]:
    """SQL as rendered here, one a line; or the authors' NAME.jsonl, with NAME.tables.jsonl beside
    it.
    """
    if format_of(path) not in (".jsonl", ".json"):
        lines = read_lines(path)
        wrong = next((i for i, line in enumerate(lines, start=1) if parse(line) is None), None)
        if wrong is not None:
            raise WeftError(
                f"{path}, line {wrong}: {lines[wrong - 1][:80]!r} is not SQL as Weft writes it, "
                "for example "
                'SELECT COUNT "Player" FROM table WHERE "No." = \'42\'.'
            )
        return references_only([line] for line in lines)
    rows, tables = read_rows(path), _tables(path)
    columns(rows, str(path), "sql")
    return references_only(
        [render(row["sql"], _schema(row, tables, f"{path}, row {i}")[0], f"{path}, row {i}")]
        for i, row in enumerate(rows, start=1)
    )


def read_outputs(path: Path, references: Path) -> list[str]:
    """SQL, one a line; or the authors' predictions, {"query": {sel, agg, conds}} or {"error": ...}
    a line.
    """
    if format_of(path) not in (".jsonl", ".json"):
        return read_lines(path)
    given, tables, rows = read_rows(references), _tables(references), read_rows(path)
    if len(rows) != len(given):
        raise WeftError(
            f"{path} has {len(rows)} outputs, and {references} has {len(given)} references."
        )
    return [
        _predicted(row, _schema(asked, tables, f"{references}, row {i}")[0])
        for i, (row, asked) in enumerate(zip(rows, given, strict=True), start=1)
    ]


def _predicted(row: Row, header: Sequence[str]) -> str:
    """A prediction as SQL; what is no query on this table is text that cannot be read back, and so
    is wrong.
    """
    try:
        return render(row["query"], header)
    except (KeyError, WeftError):
        return f"error: {row.get('error', 'no query')}"
