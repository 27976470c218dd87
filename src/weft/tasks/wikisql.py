"""`wikisql:DIR`: WikiSQL, questions about a table to SQL, as in the LoRA paper's GPT-3 table.

It reads the authors' files (train.jsonl with train.tables.jsonl, and likewise dev, test) or the
hub's rows, which include the table. Context = schema and question, target = SQL (LoRA paper,
appendix C; its wording is unknown, this is ours):

Table: "Player" (text), "No." (real) Question: Who wears 42? SQL: SELECT "Player" FROM table WHERE
"No." = '42' AND ...

Names are quoted with ", values with ', both doubled inside. A repeated column name gets " (2)" and
so on, so that the SQL can be parsed exactly. Logical-form accuracy is that of the authors'
evaluate.py: selection and aggregation are equal, and so are the conditions as a set, with values
compared as lower-case text. Output that cannot be parsed is wrong.
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
    """A logical form: the column, its aggregation, and conditions (column, operator, value), with
    columns by name.
    """

    sel: str
    agg: int
    conds: frozenset[tuple[str, int, str]]


def load_wikisql(source: Path | str = HUB) -> GenerationTask:
    """Loads from a folder or by name from the hub. Raises WeftError if a file or table is missing,
    or if a row is no query.
    """
    name = f"wikisql:{source}"
    held: dict[str, list[tuple[str, str]]] = {}
    for split, (rows, tables, where) in (
        _local(source, name) if isinstance(source, Path) else _hub(source)
    ).items():
        columns(rows, where, "question", "sql")
        held[split] = [
            (
                question_prompt(row["question"], header, types),
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
        name,
        samples,
        records,
        GENERATION,
        "logical-form accuracy",
        score_wikisql,
        right=is_right_query,
    )


def _local(folder: Path, name: str) -> dict[str, tuple[list[Row], dict[str, Row], str]]:
    found = {}
    for split, path in find_splits(folder, SPLITS, name).items():
        found[split] = (read_rows(path), _tables(path), str(path))
    return found


def _tables(path: Path) -> dict[str, Row]:
    """The tables of dev.jsonl from dev.tables.jsonl in the same folder; empty if it
    does not exist.
    """
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
    """Column names, made unique, and types ([] if unknown)."""
    table = row.get("table") or tables.get(row.get("table_id", ""))
    if table is None:
        raise WeftError(
            f"{where}: its table {row.get('table_id')!r} is missing; NAME.jsonl needs "
            "NAME.tables.jsonl in the same folder."
        )
    names: dict[str, str] = {}  # by lower case: keywords and names are case-insensitive
    for name in table["header"]:
        number, unlike = 2, name
        while unlike.lower() in names:
            unlike, number = f"{name} ({number})", number + 1
        names[unlike.lower()] = unlike
    return list(names.values()), list(table.get("types") or [])


def question_prompt(question: str, header: Sequence[str], types: Sequence[str] = ()) -> str:
    """Returns schema and question, up to the SQL."""
    known = types if len(types) == len(header) else [""] * len(header)
    schema = ", ".join(
        _sql_name(name) + (f" ({kind})" if kind else "")
        for name, kind in zip(header, known, strict=True)
    )
    return f"Table: {schema}\nQuestion: {' '.join(question.split())}\nSQL: "


def render(sql: Mapping[str, Any], header: Sequence[str], where: str = "sql") -> str:
    """Returns {sel, agg, conds} as SQL. Raises WeftError if a column, aggregation or operator does
    not exist.
    """
    try:
        call = f"{_at(AGGREGATIONS, sql['agg'])} ".lstrip()
        parts = [
            f"{_sql_name(_at(header, column))} {_at(OPERATORS, operator)} {_quoted(value)}"
            for column, operator, value in _conds(sql)
        ]
        selected = _sql_name(_at(header, sql["sel"]))
    except (KeyError, IndexError, TypeError, ValueError):
        raise WeftError(
            f"{where}: {json.dumps(sql, default=str)[:120]} is not a query on {len(header)} "
            "columns."
        ) from None
    return f"SELECT {call}{selected} FROM table" + (
        f" WHERE {' AND '.join(parts)}" if parts else ""
    )


def _at(names: Sequence[str], place: Any) -> str:
    if int(place) < 0:
        raise IndexError
    return names[int(place)]


def _conds(sql: Mapping[str, Any]) -> list[tuple[Any, Any, Any]]:
    """Conditions as a list of triples (the authors' files) or as three lists (the hub)."""
    conds = sql["conds"]
    if isinstance(conds, Mapping):
        return list(
            zip(conds["column_index"], conds["operator_index"], conds["condition"], strict=True)
        )
    return [(column, operator, value) for column, operator, value in conds]


def _sql_name(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _quoted(value: Any) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def parse(text: str) -> Query | None:
    """Parses SQL, with columns by name. Returns None if it is no SQL of this form. Keywords are
    case-insensitive.
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


def score_wikisql(outputs: Sequence[str], records: Sequence[Record]) -> Report:
    """Returns the share of outputs with the reference's logical form, in [0, 1]. Lines after the
    first are ignored.
    """
    right = sum(
        is_right_query(output, record) for output, record in zip(outputs, records, strict=True)
    )
    return Report({"logical-form accuracy": right / len(records)})


def is_right_query(output: str, record: Record) -> bool:
    """Returns True if the output or its first line parses to the logical form of a reference."""
    found = parse(output) or parse(output.strip().partition("\n")[0])
    return found is not None and found in [parse(reference) for reference in record["references"]]


def read_wikisql_references(path: Path) -> list[Record]:
    """Reads SQL as rendered here, one query per line; or the authors' NAME.jsonl with
    NAME.tables.jsonl in the same folder. Raises WeftError if a line is not such SQL.
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


def read_wikisql_outputs(path: Path, references: Path) -> list[str]:
    """Reads SQL, one query per line; or the authors' predictions, {"query": {sel, agg, conds}} or
    {"error": ...} per line. Raises WeftError if their number differs from that of the references.
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
    """A prediction as SQL. If it is no query on this table, it is text that cannot be parsed, and
    so is wrong.
    """
    try:
        return render(row["query"], header)
    except (KeyError, WeftError):
        return f"error: {row.get('error', 'no query')}"
