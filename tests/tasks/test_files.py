"""Data files as people have them: read right, or refused with file, line and column. Never another
meaning.
"""

import csv
import gzip
import json
import subprocess

import pytest

from weft.errors import WeftError
from weft.tasks.csv_text import load_csv
from weft.tasks.files import numbered_rows, read_rows

ROWS = [{"text": "naïve “a”", "label": "pos"}, {"text": "b, c", "label": "neg"}]


def written(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def as_csv(mark=","):
    return f'text{mark}label\n"naïve “a”"{mark}pos\n"b, c"{mark}neg\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "A.JSON"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path, encoding, name):
    text = {
        "a.csv": as_csv(),
        "a.jsonl": "\n".join(map(json.dumps, ROWS)),
        "A.JSON": json.dumps(ROWS),
    }
    path = written(tmp_path, name, text[name].encode(encoding))
    assert read_rows(path) == ROWS


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16le", "utf-16be"])
def test_another_encoding_is_refused_with_the_command_that_converts_it(tmp_path, encoding):
    path = written(tmp_path, "a b.csv", as_csv().encode(encoding))
    with pytest.raises(WeftError, match=r"a b\.csv, line [12]: .* if it is " + encoding) as caught:
        read_rows(path)
    command = str(caught.value).rpartition(f"{encoding}: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert read_rows(tmp_path / "utf8-a b.csv") == ROWS


def test_the_command_unpacks_a_packed_file(tmp_path):
    path = written(tmp_path, "a.csv.gz", gzip.compress(as_csv().encode("cp1252")))
    with pytest.raises(WeftError, match="if it is cp1252: zcat") as caught:
        read_rows(path)
    subprocess.run(
        str(caught.value).rpartition("cp1252: ")[2], shell=True, check=True, cwd=tmp_path
    )
    assert read_rows(tmp_path / "utf8-a.csv") == ROWS


def test_a_damaged_file(tmp_path):
    whole = gzip.compress(as_csv().encode())
    for data, says in (
        (whole[:-9], "damaged gzip"),
        (whole[:15] + b"x" * 30, "damaged gzip"),
        (b"plain", "not a gzip file"),
    ):
        with pytest.raises(WeftError, match=says):
            read_rows(written(tmp_path, "a.csv.gz", data))
    with pytest.raises(WeftError, match="byte 0x00 is no UTF-16, which the file's first bytes"):
        read_rows(written(tmp_path, "a.csv", as_csv().encode("utf-16") + b"\0"))


def test_a_cell_of_any_length(tmp_path):
    before = csv.field_size_limit()
    long = "x" * 200_000
    rows = read_rows(written(tmp_path, "a.csv", f"text,label\n{long},a\n"))
    assert rows == [{"text": long, "label": "a"}]
    assert csv.field_size_limit() == before  # the module's limit is everybody's


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "text,label,text\na,b,c\n", "line 1: the columns 1 and 3 are both called 'text'"),
        ("a.csv", "text, text ,label\na,b,c\n", "columns 1 and 2 are both called 'text'"),
        ("a.tsv", "label\tlabel\na\tb\n", "columns 1 and 2 are both called 'label'"),
        ("a.csv", 'text,label\n"a"b,c\n', "line 2: "),
        ("a.csv", 'text,label\nx,a\n"b,c\nd,e\n', "unexpected end of data"),
        ("a.csv", "text,label\na\n", r"line 2: the number of fields is not 2"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', "line 2: the key 'a' is given twice"),
        ("a.jsonl", '{"a": {"b": 1, "b": 1}}', "line 1: the key 'b' is given twice"),
        ("a.json", '[{"a": 1, "a": 1}]', "the key 'a' is given twice"),
        ("a.json", '{"a": 1}\n{"a": 1, "a": 2}', "line 2: the key 'a' is given twice"),
        ("a.jsonl", '{"a": 1}\n{"a": "\\ud800"}', "line 2: .*surrogate"),
        ("a.jsonl", '{"a": NaN}', "line 1: NaN is no number in JSON"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "line 1: a number has 5000 digits"),
        ("a.jsonl", '{"a": ' + "[" * 5000 + "}", "line 1: it is nested"),
        ("a.json", '{"a":' * 5000 + "\n1", "it is nested"),
        ("a.jsonl", '{"a": 1}\n[1]', "line 2: '.1.' is not an object"),
        ("a.jsonl", '{"a": 1}\n{"a"', "line 2: Expecting"),
        ("a.json", '[{"a": 1},\n {"a"]', "line 2: Expecting"),
        ("a.jsonl", "", "it has no rows"),
        ("a.txt", "x", "the name must end in one of"),
    ],
)
def test_what_would_get_another_meaning_is_refused(tmp_path, name, text, says):
    with pytest.raises(WeftError, match=says):
        read_rows(written(tmp_path, name, text))


def test_two_columns_of_parquet_with_one_name(tmp_path):
    from pyarrow import Table, array, parquet

    parquet.write_table(
        Table.from_arrays([array(["a"]), array(["b"])], names=["text", "text"]),
        tmp_path / "a.parquet",
    )
    with pytest.raises(WeftError, match="both called 'text'"):
        read_rows(tmp_path / "a.parquet")
    with pytest.raises(WeftError, match="cannot be read as parquet"):
        read_rows(written(tmp_path, "b.parquet", "text"))


def test_blanks_around_names_of_columns_are_no_part_of_them(tmp_path):
    path = written(tmp_path, "a.csv", " text , label\n a ,b\n")
    assert read_rows(path) == [{"text": " a ", "label": "b"}]  # cells stay as they are


def test_rows_know_their_lines(tmp_path):
    path = written(tmp_path, "a.csv", 'text,label\n"two\nlines",a\n\nb,c\n')
    assert [at for at, _ in numbered_rows(path)] == ["line 3", "line 5"]
    path = written(tmp_path, "a.jsonl", '\n{"a": 1}\n\n{"a": 2}\n')
    assert [at for at, _ in numbered_rows(path)] == ["line 2", "line 4"]
    path = written(tmp_path, "a.json", '[{"a": 1},\n{"a": 2}]')
    assert [at for at, _ in numbered_rows(path)] == ["entry 1", "entry 2"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('text\tlabel\n"a b"\tx\n"c"\ty\n', 2),  # every cell
        ('text\tlabel\nplain\tx\n"say ""hi"" now"\ty\n', 3),  # doubled quotes
    ],
)
def test_a_tsv_that_was_written_with_quotes(tmp_path, text, line):
    path = written(tmp_path, "a.tsv", text)
    says = f"a.tsv, line {line}, column 'text': the cell is in quotes"
    with pytest.raises(WeftError, match=says):
        numbered_rows(path, plain=True)
    with pytest.raises(WeftError, match=says):
        load_csv(path, None)
    assert read_rows(path)  # GLUE's files have such cells, and are never unquoted


def test_a_sentence_in_quotes_is_a_sentence(tmp_path):
    path = written(tmp_path, "a.tsv", 'text\tlabel\n"a quote"\tx\n"so" he said "no"\ty\nz\tz\n')
    assert next(row["text"] for _, row in numbered_rows(path, plain=True)) == '"a quote"'


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["1", "2", "nan"], "line 4, column 'label': the label is 'nan', a missing value"),
        (["1", "2", "many"], "line 4, column 'label': the label 'many' is no number, and '1' is"),
        (["1", "1.0", "2"], "line 3, column 'label': the label '1.0' is the same number as '1'"),
        (["0.5", "1.5", "2"], "such as '0.5' are no classes"),
        (["1", "2", ""], "line 4"),
    ],
)
def test_labels_of_a_table_that_mean_something_else(tmp_path, labels, says):
    rows = "".join(f"t{i},{label}\n" for i, label in enumerate(labels))
    with pytest.raises(WeftError, match=says):
        load_csv(written(tmp_path, "a.csv", "text,label\n" + rows), None)


def test_blanks_around_labels_of_a_table(tmp_path):
    rows = "".join(f"t{i},{label}\n" for i, label in enumerate(["a", " a", "a ", "b", "b", " b"]))
    assert load_csv(written(tmp_path, "a.csv", "text,label\n" + rows), None).classes == ("a", "b")
