"""Samples come from files, folders, globs, saved data sets and lists of them, in the formats that
people have; what would be left out or read twice is an error.
"""

import gzip
import json

import pytest
import tiny

from weft.encoding.labels import classes_of
from weft.encoding.render import Renderer, marked
from weft.errors import ConfigError, WeftError
from weft.training import formats
from weft.training.config import from_dict, to_dict
from weft.training.config.sections import DataSection, ModelSection
from weft.training.data import load_samples
from weft.training.sources import check_source, has_splits

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(6)]


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def read(given, kind=None, labels=None, **fields):
    check_source(given, "data.train")
    given = tuple(given) if isinstance(given, list) else given
    return load_samples(DataSection(train=given, **fields), kind, 0, labels)[0].rows


def load(tmp_path, rows, **fields):
    return read(lines(tmp_path / "d.jsonl", rows), **fields)


def test_lists_globs_folders_and_packed_files(tmp_path):
    a, b = lines(tmp_path / "x" / "a.jsonl", ROWS[:2]), lines(tmp_path / "x" / "b.jsonl", ROWS[2:4])
    deep = lines(tmp_path / "x" / "y" / "c.jsonl", ROWS[4:])
    lines(tmp_path / "x" / ".hidden.jsonl", [{"text": "never"}])
    assert read([a, b, deep]) == ROWS == read([str(tmp_path / "x" / "?.jsonl"), deep])
    assert read(str(tmp_path / "x" / "**" / "*.jsonl")) == ROWS
    folder = tmp_path / "z"
    lines(folder / "a.jsonl", ROWS[:2])
    with gzip.open(folder / "b.jsonl.gz", "wt") as packed:
        packed.write("\n".join(map(json.dumps, ROWS[2:])))
    (folder / "README.md").write_text("about")
    assert read(str(folder)) == ROWS


def test_a_saved_data_set_and_its_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    whole, split = str(tmp_path / "one"), str(tmp_path / "two")
    datasets.Dataset.from_list(ROWS).save_to_disk(whole)
    parts = {
        "train": datasets.Dataset.from_list(ROWS[:4]),
        "test": datasets.Dataset.from_list(ROWS[4:]),
    }
    datasets.DatasetDict(parts).save_to_disk(split)
    assert read(whole) == ROWS and not has_splits(whole)
    assert read(split) == ROWS[:4] and read(split, split="test") == ROWS[4:] and has_splits(split)
    with pytest.raises(WeftError, match="has no split 'dev'"):
        read(split, split="dev")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(WeftError, match="cannot be read as a saved data set"):
        read(whole)


@pytest.mark.parametrize(
    ("names", "given", "says"),
    [
        (["train.jsonl", "test.jsonl"], ".", "'test.jsonl' are different splits|'train.jsonl' are"),
        (["train-0.parquet", "validation-0.parquet"], ".", "are different splits"),
        (["a.jsonl", "notes.txt"], ".", "it has 'notes.txt'"),
        (["a.jsonl", "deep/b.jsonl"], ".", "it has 'deep'"),
        (["README.md"], ".", "it has none"),
        (["a.jsonl"], "*.csv", "no file fits"),
        (["a.jsonl", "a.txt"], "a.*", "a.txt.*does not end in a known format"),
        (["a.jsonl"], ["a.jsonl", "*.jsonl"], "is given 2 times"),
        (["a.jsonl"], ["a.jsonl", "b.jsonl"], "no such file. Nearest: a.jsonl"),
        ([], [], "write a file, a folder"),
    ],
)
def test_what_a_source_cannot_mean(tmp_path, names, given, says):
    for name in names:
        lines(tmp_path / name, ROWS[:1])
    if isinstance(given, list):
        given = [str(tmp_path / name) for name in given]
    else:
        given = str(tmp_path / given)
    with pytest.raises(ConfigError, match=says):
        check_source(given, "data.train")


def test_a_list_goes_through_yaml_and_back():
    run = {"out": "o", "model": {"path": "m"}, "method": {"name": "LoRA"}}
    config = from_dict({**run, "data": {"train": ["a.jsonl", "b.jsonl"], "eval": "c.jsonl"}})
    assert config.data.train == ("a.jsonl", "b.jsonl")
    assert from_dict(to_dict(config)) == config
    with pytest.raises(ConfigError, match=r"data\.train=.*items are text, and 3 is not"):
        from_dict({**run, "data": {"train": ["a.jsonl", 3]}})


def test_sharegpt(tmp_path):
    said = [("system", "s"), ("human", "q"), ("gpt", "a"), ("observation", "o"), ("gpt", "b")]
    wanted = [
        {"role": role, "content": text}
        for role, text in zip(
            ("system", "user", "assistant", "tool", "assistant"), "sqaob", strict=True
        )
    ]
    talk = [{"from": who, "value": text} for who, text in said]
    assert load(tmp_path, [{"conversations": talk}])[0]["messages"] == wanted
    assert load(tmp_path, [{"c": talk}], columns={"messages": "c"})[0]["messages"] == wanted
    assert load(tmp_path, [{"messages": talk}])[0]["messages"] == wanted
    assert load(tmp_path, [{"conversations": wanted}])[0]["messages"] == wanted
    assert load(tmp_path, [{"conversations": json.dumps(talk)}])[0]["messages"] == wanted
    filled = [{"role": None, "content": None, **message} for message in talk]  # as parquet does
    assert load(tmp_path, [{"conversations": filled, "messages": None}])[0]["messages"] == wanted


def test_sharegpt_is_seen_in_every_record(tmp_path):
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    wanted = [{"messages": talk}] * 2
    for first, second in (
        ({"messages": talk}, {"conversations": said}),
        ({"conversations": said}, {"messages": talk}),
        ({"conversation": said}, {"conversations": talk}),
        ({"messages": talk}, {"messages": said, "conversations": []}),
    ):
        assert load(tmp_path, [first, second]) == wanted
    with pytest.raises(WeftError, match="sample 2: nothing reads the column 'conversations'"):
        load(tmp_path, [{"messages": talk}, {"messages": talk, "conversations": said}])


@pytest.mark.parametrize(
    ("talk", "says"),
    [
        ([{"from": "humam", "value": "q"}], "nobody is called 'humam' .from.. Nearest: human"),
        ([{"from": "human", "value": "q"}, {"role": "user"}], "message 2: .*has no from and value"),
        ([{"from": "human", "text": "q"}], "message 1: .*has no from and value"),
        ([{"from": "human", "value": "q", "content": "r"}], "both value and content"),
        ('[{"from": 1, "from": 2}]', "the key 'from' is given twice"),
    ],
)
def test_sharegpt_that_is_none_names_line_and_column(tmp_path, talk, says):
    good = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    with pytest.raises(WeftError, match=rf"d.jsonl, line 2, column 'conversations'.*{says}"):
        load(tmp_path, [{"conversations": good}, {"conversations": talk}])


def test_prompts_and_completions_that_are_messages(tmp_path):
    earlier, asked = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}], {
        "role": "user", "content": "3",
    }  # fmt: skip
    answer = {"role": "assistant", "content": "4"}
    rows = [{"prompt": [*earlier, asked], "completion": [answer]}]
    (found,) = load(tmp_path, rows)
    # What the prompt holds is not in the loss, answers included.
    assert found["messages"] == [earlier[0], {**earlier[1], "train": False}, asked, answer]
    for row in (
        {"prompt": [asked], "completion": "4"},
        {"prompt": json.dumps([asked]), "completion": "4"},
    ):
        assert load(tmp_path, [row])[0]["messages"] == [asked, answer]
    mapped = [{"q": [asked], "a": [answer]}]
    (found,) = load(tmp_path, mapped, columns={"prompt": "q", "completion": "a"})
    assert found["messages"] == [asked, answer]
    with pytest.raises(
        WeftError, match=r"line 1, column 'completion': .5. is neither text nor a list"
    ):
        load(tmp_path, [{"prompt": [asked], "completion": [5]}])


def test_numbers_and_booleans_are_text_as_json_writes_them(tmp_path):
    rows = [{"prompt": 2, "completion": value} for value in (4, True, 0.5, "x")]
    found = load(tmp_path, rows)
    assert [row["completion"] for row in found] == ["4", "true", "0.5", "x"]
    assert found[0]["prompt"] == "2"
    with pytest.raises(WeftError, match="is not text"):
        load(tmp_path, [{"prompt": "a", "completion": {"b": 1}}])


@pytest.mark.parametrize("column", formats.TEXTS)
def test_a_number_is_text_in_every_text_column_and_a_format_reads_each(tmp_path, column):
    groups = (*formats.NEEDED.values(), *((*texts, "label") for texts in formats.LABELLED))
    group = next((g for g in groups if column in g), None)
    if group is None:  # an optional one
        chosen = next(name for name, more in formats.OPTIONAL.items() if column in more)
        group = formats.NEEDED[chosen]
    row = {**dict.fromkeys(group, "a"), column: 4}
    (found,) = load(tmp_path, [row])
    assert "4" in json.dumps(found) and " 4" not in json.dumps(found)


def labelled(labels):
    return [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([1, 2, 10], ("1", "2", "10")),
        ([True, False], ("false", "true")),
        ([" a", "a ", "b"], ("a", "b")),
        ([0.0, 1.0], ("0.0", "1.0")),
        (["1e", "٣", "1_0"], ("1_0", "1e", "٣")),
    ],
)
def test_labels_of_any_type_are_classes(tmp_path, labels, classes):
    path = lines(tmp_path / "d.jsonl", labelled(labels))
    assert classes_of(load_samples(DataSection(train=path), None, 0)[0]) == classes


def test_one_class_is_none(tmp_path):
    """The test splits of some data sets on the hub have -1 for every label."""
    path = lines(tmp_path / "d.jsonl", labelled([-1, -1]))
    with pytest.raises(WeftError, match="all labels are '-1'"):
        classes_of(load_samples(DataSection(train=path), None, 0)[0])


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([1, "nan", 2], "line 2, column 'label': the label is 'nan', a missing value"),
        (["a", None], "line 2, column 'label': the label is None, a missing value"),
        (["a", " "], "line 2, column 'label': the label is '', a missing value"),
        ([1, 2, "three"], "line 3, column 'label': the label 'three' is no number"),
        ([1, 1.0], "line 2, column 'label': the label '1.0' is the same number as '1'"),
        ([["a"], "b"], "line 1, column 'label': the label is .* neither a class nor a number"),
        ([0.5, 1.0, 2.5], "not all whole, such as '0.5'. Write model.kind: regression"),
    ],
)
def test_labels_that_would_mean_something_else(tmp_path, labels, says):
    with pytest.raises(WeftError, match=says):
        load(tmp_path, labelled(labels))


def test_labels_that_are_listed_are_classes_whatever_they_look_like(tmp_path):
    found = load(tmp_path, labelled([1, "nan", "three"]), labels=("1", "nan", "three"))
    assert [row["label"] for row in found] == ["1", "nan", "three"]
    assert load(tmp_path, labelled([0.5, 1.5]), kind="classification")[0]["label"] == "0.5"


@pytest.mark.parametrize("wrong", ["nan", "inf", "x", "", None, True, [1], "1_0"])
def test_a_regression_has_numbers_only(tmp_path, wrong):
    assert load(tmp_path, labelled([1, "2.5", " 3 "]), kind="regression")[1]["label"] == 2.5
    with pytest.raises(
        WeftError, match=r"line 2, column 'label': .* is not a number, and this is a"
    ):
        load(tmp_path, labelled([1.5, wrong]), kind="regression")


def test_a_label_of_another_name_and_one_that_is_no_label(tmp_path):
    rows = [{"text": "a", "score": value} for value in (1.5, "nan")]
    with pytest.raises(WeftError, match="line 2, column 'score'"):
        load(tmp_path, rows, kind="regression", columns={"label": "score"})


@pytest.mark.parametrize("labels", [["a", "a", "b"], ["a", "a "], [" a", "b"], ["", "a"]])
def test_names_of_classes_are_given_once_without_blanks(labels):
    with pytest.raises(ConfigError, match=r"model\.labels=.*given once"):
        ModelSection(path="m", labels=tuple(labels))
    with pytest.raises(ConfigError, match="needs two classes"):
        ModelSection(path="m", labels=("a",))


def test_answers_in_a_prompt_are_not_in_the_loss(tmp_path):
    earlier = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "two"}]
    row = {
        "prompt": [*earlier, {"role": "user", "content": "3"}],
        "completion": [{"role": "assistant", "content": "four"}],
    }
    path = lines(tmp_path / "d.jsonl", [row])
    samples = load_samples(DataSection(train=path), None, 0)[0]
    made = tiny.tokenizer()
    coded = Renderer(made, 512).encode(samples, "training")[0]
    text = marked(made, list(coded["input_ids"]), list(coded["labels"]))
    assert "⟦four<|im_end|>⟧" in text and text.count("⟦") == 1


@pytest.mark.parametrize("key", ["data", "rows"])
def test_records_within_an_object_are_told_from_a_record(tmp_path, key):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"version": 1, key: ROWS}))
    says = rf"one record, whose '{key}' is a list of 6 objects.*write that list alone"
    with pytest.raises(WeftError, match=says):
        read(str(path))
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({key: talk}))
    assert read(str(path), columns={"messages": key}) == [{"messages": talk}]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "prompt;completion\na;b\n", "separated by ';'. A .csv is separated by a comma"),
        ("a.csv", "prompt;completion\na, b;c\n", "separated by ';'"),
        ("a.csv", "prompt\tcompletion\na\tb\n", "'.t'. A .csv .*.tsv is separated by tabs"),
        ("a.tsv", "prompt,completion\na,b\n", "separated by ','. A .tsv is separated by a tab"),
    ],
)
def test_a_table_with_another_separator_names_it(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(WeftError, match=f"{name}: its header is one column.*{says}"):
        read(str(tmp_path / name))
