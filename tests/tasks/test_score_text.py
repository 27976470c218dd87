"""SAMSum, WikiSQL, commonsense and GLUE scores: small cases worked out by hand, properties, and
files at fault.
"""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import weft
from weft.cli import main
from weft.tasks import commonsense, glue, samsum, wikisql
from weft.tasks.generation import references_only
from weft.tasks.scoring import score_files


def write(folder, references, outputs, ending=".txt"):
    paths = folder / f"refs{ending}", folder / f"outs{ending}"
    for path, text in zip(paths, (references, outputs), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def test_rouge_of_a_case_worked_out_by_hand():
    # "tom will buy milk" against "tom buys milk today": stems tom, buy, milk shared, one pair of 3,
    # 3 in order
    found = samsum.score_samsum(
        ["Tom will buy milk."], references_only([["Tom buys milk today"]])
    ).scores
    assert found == pytest.approx({"ROUGE-1": 0.75, "ROUGE-2": 1 / 3, "ROUGE-L": 0.75})


def test_rouge_takes_the_best_reference_and_is_one_for_identical_text():
    found = samsum.score_samsum(["a b c", "x"], references_only([["q", "a b c"], ["y"]])).scores
    assert found == pytest.approx({"ROUGE-1": 0.5, "ROUGE-2": 0.5, "ROUGE-L": 0.5})


HEADER = ["Player", 'No. "x"', "it's AND", "Player", "player"]
names = ["Player", 'No. "x"', "it's AND", "Player (2)", "player (3)"]
values = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12).map(
    lambda s: s.replace("\n", " ")
)
conditions = st.lists(
    st.tuples(
        st.integers(0, 4), st.integers(0, 3), st.one_of(values, st.integers(), st.floats(-9, 9))
    ),
    max_size=4,
)


def rendered(sel, agg, conds):
    return wikisql.render({"sel": sel, "agg": agg, "conds": conds}, names)


@given(st.integers(0, 4), st.integers(0, 5), conditions)
def test_sql_is_read_back_as_it_was(sel, agg, conds):
    found = wikisql.parse(rendered(sel, agg, conds))
    wanted = frozenset((names[c].lower(), o, str(v).lower()) for c, o, v in conds)
    assert found == wikisql.Query(names[sel].lower(), agg, wanted)


@given(st.integers(0, 4), st.integers(0, 5), conditions, st.randoms(use_true_random=False))
def test_the_order_of_conditions_and_the_case_of_values_do_not_matter(sel, agg, conds, draw):
    mixed = [
        (c, o, str(v).upper() if str(v).upper().lower() == str(v).lower() else v)
        for c, o, v in conds
    ]
    draw.shuffle(mixed)
    record = references_only([[rendered(sel, agg, conds)]])
    assert wikisql.score_wikisql([rendered(sel, agg, mixed)], record).scores == {
        "logical-form accuracy": 1.0
    }


GOLD = rendered(0, 3, [(1, 0, 42), (2, 1, "a'b")])


@pytest.mark.parametrize(
    ("output", "right"),
    [
        (GOLD, True),
        (GOLD.lower(), True),
        (f"  {GOLD} ;", True),
        (f"{GOLD}\nQuestion: more", True),
        (
            rendered(0, 3, [(2, 1, "A'B"), (1, 0, "42"), (1, 0, 42)]),
            True,
        ),  # as a set, as text, in lower case
        (rendered(3, 3, [(1, 0, 42), (2, 1, "a'b")]), False),
        (rendered(0, 4, [(1, 0, 42), (2, 1, "a'b")]), False),
        (rendered(0, 3, [(1, 1, 42), (2, 1, "a'b")]), False),
        (rendered(0, 3, [(1, 0, 42.0), (2, 1, "a'b")]), False),
        (rendered(0, 3, [(1, 0, 42)]), False),
        ("", False),
        (GOLD + " OR 1", False),
        ("SELECT nothing", False),
        (GOLD.replace(" WHERE ", " AND ", 1), False),
    ],
)
def test_logical_form_accuracy_is_that_of_the_authors_evaluation(output, right):
    assert wikisql.score_wikisql([output], references_only([[GOLD]])).scores[
        "logical-form accuracy"
    ] == float(right)


def test_wikisql_files_of_the_authors_are_scored(tmp_path):
    tables = [
        {
            "id": "1-1",
            "header": HEADER,
            "types": ["text", "real", "text", "text", "text"],
            "rows": [],
        }
    ]
    asked = [
        {"question": "Who?", "table_id": "1-1", "sql": {"sel": 3, "agg": 0, "conds": [[1, 0, 5]]}}
    ] * 3
    predicted = [
        {"query": {"sel": 3, "agg": 0, "conds": [[1, 0, "5"]]}},
        {"query": {"sel": 0, "agg": 0, "conds": []}},
        {"error": "no"},
    ]
    references, outputs = tmp_path / "dev.jsonl", tmp_path / "pred.jsonl"
    for path, rows in (
        (references, asked),
        (outputs, predicted),
        (tmp_path / "dev.tables.jsonl", tables),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert score_files("wikisql", references, outputs).scores == pytest.approx(
        {"logical-form accuracy": 1 / 3}
    )
    lines = tmp_path / "out.txt"
    lines.write_text('SELECT "Player (2)" FROM table WHERE "No. ""x""" = \'5\'\n\n\n')
    assert score_files("wikisql", references, lines).scores == pytest.approx(
        {"logical-form accuracy": 1 / 3}
    )
    (tmp_path / "dev.tables.jsonl").unlink()
    with pytest.raises(weft.WeftError, match=r"row 1: its table '1-1' is missing"):
        score_files("wikisql", references, lines)


@pytest.mark.parametrize(
    ("output", "answer", "right"),
    [
        ("the correct answer is answer3", "answer3", True),
        ("answer1 and not answer3", "answer3", False),
        ("The answer is: true!", "true", True),
        ("True", "true", False),
        ("false, true", "false", True),
        ("solution2", "solution1", False),
        ("solution3 solution1", "solution1", True),
        ("answer6 answer5", "answer5", True),
        ("", "ending2", False),
        ("option1", "option1", True),
        ("ending4", "ending4", True),
    ],
)
def test_the_first_key_word_of_the_data_set_counts(output, answer, right):
    assert commonsense.score_commonsense([output], references_only([[answer]])).scores[
        "accuracy"
    ] == float(right)


def test_the_average_is_unweighted_over_data_sets():
    records = [{"prompt": "", "references": ["true"], "group": "boolq"}] * 3
    records.append({"prompt": "", "references": ["answer1"], "group": "obqa"})
    found = commonsense.score_commonsense(["true", "false", "false", "answer1"], records).scores
    assert found == pytest.approx(
        {"accuracy": (1 / 3 + 1) / 2, "accuracy boolq": 1 / 3, "accuracy obqa": 1.0}
    )


def test_glue_metrics_of_cases_worked_out_by_hand():
    labels, predicted = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]  # 2 and 1 right, 1 and 1 wrong
    assert glue.score_glue(predicted, labels, "mrpc").scores == pytest.approx(
        {"accuracy": 3 / 5, "F1": 2 / 3}
    )
    matthews = (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)
    assert glue.score_glue(predicted, labels, "cola").scores == pytest.approx(
        {"Matthews": matthews}
    )
    found = glue.score_glue([1.0, 2.0, 4.0], [0.0, 1.0, 1.0], "stsb").scores
    assert found == pytest.approx(
        {"Pearson": 4 / 3 / math.sqrt(14 / 3 * 2 / 3), "Spearman": math.sqrt(3) / 2}
    )


def test_a_correlation_with_equal_numbers_is_missing_and_not_zero():
    report = glue.score_glue([2.0, 2.0], [1.0, 3.0], "stsb")
    assert (
        report.scores == {"Pearson": None, "Spearman": None}
        and "equal numbers" in report.reasons["Pearson"]
    )


def test_labels_are_read_as_numbers_names_and_columns(tmp_path):
    held, said = (
        "index\tlabel\n0\tentailment\n1\tnot_entailment\n",
        "index\tprediction\n0\t0\n1\t0\n",
    )
    references, outputs = write(tmp_path, held, said, ".tsv")
    assert score_files("rte", references, outputs).scores == {"accuracy": 0.5}
    lines, _ = write(tmp_path, "not_entailment\nentailment\n", "")
    assert score_files("rte", references, lines).scores == {"accuracy": 0.0}


@pytest.mark.parametrize(
    ("task", "references", "outputs", "said"),
    [
        ("samsum", "a\nb\n", "x\n", "has 1 outputs, and .* has 2 references"),
        ("rte", "0\n1\n", "0\n1\n0\n", "has 3 outputs, and .* has 2 references"),
        ("rte", "0\n2\n", "0\n1\n", r"refs.txt, line 2: the label '2' is not one of"),
        ("stsb", "0.5\nhigh\n", "1\n2\n", "line 2: the score 'high' is not a number"),
        ("boolq", "true\nyes\n", "true\ntrue\n", "line 2: 'yes' is not a key word"),
        (
            "wikisql",
            "SELECT a FROM b\n",
            "\n",
            "line 1: 'SELECT a FROM b' is not SQL as Weft writes it",
        ),
        ("samsum", "", "", "nothing to score"),
    ],
)
def test_files_at_fault_are_refused(tmp_path, task, references, outputs, said):
    with pytest.raises(weft.WeftError, match=said):
        score_files(task, *write(tmp_path, references, outputs))


def test_the_command_prints_scores_and_writes_them(tmp_path, capsys):
    references, outputs = write(tmp_path, "1\n0\n1\n", "1\n0\n0\n")
    asked = ["score", "--task", "sst2", "--references", str(references), "--outputs", str(outputs)]
    assert main([*asked, "--json", str(tmp_path / "s.json")]) == 0
    assert capsys.readouterr().out == "accuracy  0.6667\n"
    wanted = {
        "schema": 1,
        "task": "sst2",
        "scores": {"accuracy": pytest.approx(2 / 3)},
        "reasons": {},
        "notes": [],
    }
    assert json.loads((tmp_path / "s.json").read_text()) == wanted


def test_the_command_says_what_is_missing_and_why(tmp_path, capsys):
    references, outputs = write(tmp_path, "1\n0\n", "1\n1\n")
    assert (
        main(
            [
                "score",
                "--task",
                "stsb",
                "--references",
                str(references),
                "--outputs",
                str(outputs),
                "--json",
                str(tmp_path / "s.json"),
            ]
        )
        == 0
    )
    assert "Pearson   missing: the correlation with equal" in capsys.readouterr().out
    held = json.loads((tmp_path / "s.json").read_text())
    assert held["scores"]["Pearson"] is None and held["reasons"]["Pearson"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--task", "bleu"], "has no scorer. Nearest:"),
        (["--outputs", "nowhere.txt"], "nowhere.txt: there is no such file"),
        (["--json", "nowhere/s.json"], "there is no directory"),
    ],
)
def test_a_wrong_argument_is_status_2_and_one_line(tmp_path, capsys, change, said):
    references, outputs = write(tmp_path, "1\n", "1\n")
    asked = [
        "score",
        "--task",
        "sst2",
        "--references",
        str(references),
        "--outputs",
        str(outputs),
        *change,
    ]
    assert main(asked) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
