"""MT-Bench with a judge that fails in every way: nothing that was answered is lost, asked twice, or
taken for a grade.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from urllib.parse import quote

import pytest

from judge_server import GRADED, judge
from weft.cli import main
from weft.errors import ConfigError, WeftError
from weft.tasks.endpoint import Endpoint, Patience, Refused, Unanswered
from weft.tasks.files import read_rows
from weft.tasks.journal import Journal
from weft.tasks.judge_prompts import OURS, read_prompts
from weft.tasks.judging import GIVE_UP, judge_all, summary
from weft.tasks.mt_bench import SETTINGS, asks, grade, read_answers, read_questions


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def bench(folder, n=3):
    """n questions of two turns with their answers, in FastChat's files; every second one has
    references.
    """
    rows = [
        {
            "question_id": 81 + i,
            "category": ("writing", "math")[i % 2],
            "turns": [f"first {i}?", f"then {i}?"],
            **({"reference": [f"ref {i}", ""]} if i % 2 else {}),
        }
        for i in range(n)
    ]
    said = [
        {
            "question_id": 81 + i,
            "answer_id": "x",
            "model_id": "m",
            "tstamp": 0.0,
            "choices": [{"index": 0, "turns": [f"one {{answer_2}} {i}", f"two {i}"]}],
        }
        for i in range(n)
    ]
    (folder / "out").mkdir(exist_ok=True)
    for path, held in (
        (folder / "questions.jsonl", rows),
        (folder / "out" / "answers.jsonl", said),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in held))
    return folder / "questions.jsonl", folder / "out"


def endpoint(seen, **patience):
    pauses = []
    chosen = Patience(**{"tries": 3, "first": 0.01, "timeout": 5.0, **patience})
    return Endpoint(
        seen.url, "judge-1", settings=SETTINGS, patience=chosen, sleep=pauses.append
    ), pauses


def run_judge(folder, seen, n=3, again=False, **patience):
    path, out = bench(folder, n)
    asked, _ = endpoint(seen, **patience)
    answers = read_answers(read_rows(out / "answers.jsonl"), "answers")
    wanted = asks(read_questions(path), answers, asked, OURS, "answers")
    with Journal(out / "judgments.jsonl") as kept, Journal(out / "attempts.jsonl") as failed:
        outcome = judge_all(wanted, asked, kept, failed, again=again)
        rows, attempts = list(kept.rows), list(failed.rows)
    report, counts = summary(wanted, outcome)
    return report, counts, rows, attempts


def words(folder, seen, *more):
    path, out = bench(folder)
    return [
        "judge",
        "--questions",
        str(path),
        "--out",
        str(out),
        "--url",
        seen.url,
        "--judge",
        "judge-1",
        *more,
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Grade: [[7]]", 7),
        ("fine\n\nRating: [[8.5]]\n", 8.5),
        ("[[3]] since it is short.\nNo more.", 3),
        ("It prints [[1]].\nGrade: [[9]]", 9),
        ("[[2]] and [[2]]\nthat is all", 2),
        ("[[ 10 ]]", 10),
        ("", None),
        ("7", None),
        ("[7]", None),
        ("[[seven]]", None),
        ("[[7/10]]", None),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[-3]]", None),
        ("[[3]] or [[8]]", None),
        ("[[3]]\n[[8]] here\nand so on", None),
        ("[[nan]]", None),
    ],
)
def test_a_grade_is_read_or_there_is_none(text, value):
    assert grade(text) == value


def test_every_failure_that_may_pass_is_tried_again_with_growing_pauses_and_the_servers_own():
    script = [
        ("die",),
        ("status", 429, {"Retry-After": "7"}, "slow down"),
        ("status", 500, {}, "oh"),
        ("raw", b"<html>busy"),
        ("raw", b'{"choices": []}'),
        ("raw", b'{"choices": [{"message": {"content": null}}]}'),
        ("cut",),
        ("drip", 3.0),
        ("hang", 1.0),
        ("status", 503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, ""),
        GRADED,
    ]
    failed = []
    with judge(lambda i, _: script[i]) as seen:
        asked, pauses = endpoint(seen, tries=len(script), timeout=0.3, first=1.0, longest=20.0)
        assert asked.ask([{"role": "user", "content": "?"}], failed.append) == GRADED[1]
    assert len(seen.bodies) == len(script) == len(failed) + 1
    assert [a.status for a in failed] == [None, 429, 500, 200, 200, 200, 200, None, None, 503]
    assert pauses == [a.pause for a in failed]
    assert pauses[1] == 7 and pauses[-1] == 0  # the server's seconds; its date, which has passed
    own = {0: 1, 2: 4, 3: 8, 4: 16, 5: 20, 6: 20, 7: 20, 8: 20}
    assert all(top / 2 <= pauses[i] <= top for i, top in own.items()), pauses
    assert (
        "busy" in failed[3].reason
        and "slow down" in failed[1].reason
        and "0.3 seconds" in failed[7].reason
    )


def test_what_will_not_pass_is_not_tried_again_and_the_key_goes_nowhere_else(tmp_path):
    def script(_, body):
        return {
            "bad": ("status", 400, {}, "too long"),
            "key": ("status", 401, {}, "wrong key sk-secret"),
            "moved": ("status", 302, {"Location": other.url}, ""),
            "later": ("status", 429, {"Retry-After": "86400"}, "quota"),
        }[body["messages"][0]["content"]]

    with judge(lambda i, b: GRADED) as other, judge(script) as seen:
        for word, error, told in (
            ("bad", Unanswered, "too long"),
            ("key", Refused, "MY_KEY"),
            ("moved", Refused, "--url"),
            ("later", Refused, "86400 seconds"),
        ):
            asked = Endpoint(
                seen.url, "j", "sk-secret", "MY_KEY", sleep=lambda _: pytest.fail("it waited")
            )
            with pytest.raises(error, match=told) as caught:
                asked.ask([{"role": "user", "content": word}], lambda _: None)
            assert "sk-secret" not in str(caught.value) + repr(asked)
        assert len(seen.bodies) == 4 and other.bodies == []
        assert {h["Authorization"] for h in seen.headers} == {"Bearer sk-secret"}
        assert set(seen.paths) == {"/v1/chat/completions"}


SLOW = b"HTTP/1.1 200 OK\r\n" + b"X-Drip: 1\r\n" * 60 + b"\r\n"


@pytest.mark.parametrize(
    "data",
    [SLOW, b"HTTP/1.1 100 Continue\r\n\r\n" * 40, b"HTTP/1.1 500 " + b"x" * 500],
    ids=["headers", "continue", "status"],
)
def test_one_deadline_holds_for_the_whole_exchange(data):
    ended = threading.Event()
    with judge(lambda *_: ("wire", data, 0.05)) as seen:
        asked = Endpoint(seen.url, "j", patience=Patience(tries=1, timeout=0.4))

        def ask():
            with pytest.raises(Unanswered, match=r"0\.4 seconds"):
                asked.ask([{"role": "user", "content": "?"}], lambda _: None)
            ended.set()

        threading.Thread(target=ask, daemon=True).start()
        assert ended.wait(8), "it waits for as long as the server sends"  # which is 25 s and more


KEY = 'sk-"/<&' + "k" * 40
ECHOES = [KEY, json.dumps(KEY)[1:-1], json.dumps(KEY)[1:-1].replace("/", "\\/"), quote(KEY, "")]


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("padding", [0, 95, 280])
def test_a_key_that_the_server_repeats_is_nowhere_nor_a_part_of_it(echo, padding, tmp_path):
    before = "p" * padding
    script = [
        ("raw", f"{before}{echo}".encode()),
        ("status", 500, {}, before + echo),
        ("wire", f"HTTP/9.{before}{echo}\r\n\r\n".encode()),
        ("raw", json.dumps({"choices": [{"message": {"content": before + KEY}}]}).encode()),
    ]
    failed = []
    with judge(lambda i, _: script[i]) as seen:
        asked = Endpoint(seen.url, "j", KEY, patience=Patience(tries=4), sleep=lambda _: None)
        answer = asked.ask([{"role": "user", "content": "?"}], failed.append)
    assert answer == before + "***"
    assert len(failed) == 3
    for text in (answer, *(attempt.reason for attempt in failed)):
        assert "kkkk" not in text and "sk-" not in text


def test_control_characters_of_a_server_do_not_reach_the_terminal(tmp_path, capfd, monkeypatch):
    evil = "\x1b]0;title\x07\x1b[2J\u202e\x9b31m"
    script = [("raw", evil.encode()), ("status", 400, {}, evil)]
    with judge(lambda i, _: script[min(i, 1)]) as seen:
        assert main(words(tmp_path, seen, "--tries", "2", "--limit", "1")) == 1
    said = "".join(capfd.readouterr())
    kept = (tmp_path / "out" / "attempts.jsonl").read_text(encoding="utf-8")
    assert "HTTP 400" in said and "title" in kept
    assert not set(said + json.loads(kept.splitlines()[0])["reason"]) & set("\x1b\x07\x9b\u202e")


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "file:///etc/passwd",
        "http://",
        "https://me:key@host/v1",
        "https://h/v1?key=x",
    ],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="--url"):
        Endpoint(url, "j")


def test_the_judge_sees_one_turn_then_both_with_the_reference_where_there_is_one(tmp_path):
    with judge(lambda *_: GRADED) as seen:
        _, counts, rows, _ = run_judge(tmp_path, seen, 2)
    first, second, with_reference, last = seen.questions()
    assert (
        "first 0?" in first
        and "one {answer_2} 0" in first
        and "then 0?" not in first
        and "two 0" not in first
    )
    assert (
        all(text in second for text in ("first 0?", "one {answer_2} 0", "then 0?", "two 0"))
        and "reference" not in second
    )
    assert (
        "ref 1" in with_reference and "reference" not in last
    )  # the second turn's reference is empty
    assert counts == {"answers": 4, "graded": 4, "unparsable": 0, "unanswered": 0, "not asked": 0}
    assert seen.bodies[0]["temperature"] == 0 and seen.bodies[0]["model"] == "judge-1"
    assert [(r["question_id"], r["turn"], r["score"]) for r in rows] == [
        (81, 1, 7),
        (81, 2, 7),
        (82, 1, 7),
        (82, 2, 7),
    ]


def test_a_text_without_a_grade_is_a_failure_and_never_zero_and_not_asked_again_unless_asked(
    tmp_path,
):
    with judge(
        lambda i, _: ("text", "I would rather not say.") if i == 1 else ("text", f"[[{4 + i}]]")
    ) as seen:
        report, counts, *_ = run_judge(tmp_path, seen, 2)
        assert report.scores == {
            "average": pytest.approx((4 + 6 + 7) / 3),
            "turn 1": 5,
            "turn 2": 7,
            "category math": 6.5,
            "category writing": 4,
        }
        assert counts["unparsable"] == 1 and any("not as zero" in note for note in report.notes)
        again, counts, *_ = run_judge(tmp_path, seen, 2)
        assert len(seen.bodies) == 4 and again.scores == report.scores and counts["unparsable"] == 1
        mended, counts, *_ = run_judge(tmp_path, seen, 2, again=True)
        assert len(seen.bodies) == 5 and seen.bodies[4] == seen.bodies[1]
        assert mended.scores["turn 2"] == pytest.approx((7 + 8) / 2) and counts["graded"] == 4


def test_no_grade_at_all_is_no_score_with_a_reason(tmp_path):
    with judge(lambda *_: ("text", "?")) as seen:
        report, *_ = run_judge(tmp_path, seen, 1)
    assert set(report.scores.values()) == {None} and set(report.reasons) == set(report.scores)


def test_a_judge_that_dies_loses_nothing_and_is_not_asked_twice(tmp_path):
    alive = True
    with judge(lambda i, _: GRADED if (alive and i < 3) or i >= 100 else ("die",)) as seen:
        report, counts, rows, attempts = run_judge(tmp_path, seen, 5, tries=2)
        assert len(rows) == 3 == counts["graded"] and counts["unanswered"] == GIVE_UP
        assert counts["not asked"] == 10 - 3 - GIVE_UP and any(
            "Stopped" in note for note in report.notes
        )
        assert (
            len(attempts) == 2 * GIVE_UP
            and attempts[0]["try"] == 1
            and attempts[1]["pause"] is None
        )
        assert all(row["reason"] and row["time"] and row["request"] for row in attempts)
    with judge(lambda *_: GRADED) as other:
        report, counts, rows, attempts = run_judge(tmp_path, other, 5)
    assert counts["graded"] == 10 == len(rows) and len(other.bodies) == 7
    assert not {str(b) for b in other.bodies} & {str(b) for b in seen.bodies[:3]}
    assert len(attempts) == 2 * GIVE_UP  # those of the first run are still there
    assert any("2 addresses" in note for note in report.notes)


def test_another_answer_judge_or_setting_is_another_judgment(tmp_path):
    path, _ = bench(tmp_path, 1)
    questions, answers = read_questions(path), {81: ("a", "b")}
    with judge(lambda *_: GRADED) as seen:
        usual = asks(questions, answers, endpoint(seen)[0], OURS, "f")
        others = [
            asks(questions, {81: ("a", "c")}, endpoint(seen)[0], OURS, "f"),
            asks(questions, answers, Endpoint(seen.url, "judge-2"), OURS, "f"),
            asks(
                questions,
                answers,
                Endpoint(seen.url, "judge-1", settings={"temperature": 1}),
                OURS,
                "f",
            ),
        ]
    assert usual[0].request == others[0][0].request  # the first turn is the same
    assert len({a.request for found in (usual, *others) for a in found}) == 2 + 1 + 2 + 2


def test_a_line_cut_off_by_a_kill_is_dropped_and_damage_elsewhere_is_an_error(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "\xc3\xa4"}\n{"c": "\xc3')
    with Journal(path) as kept:
        assert kept.rows == [{"a": 1}, {"b": "ä"}]
        kept.append({"d": "\ud800"})  # what a judge may send and no UTF-8 file can hold
    with Journal(path) as kept:
        assert len(kept.rows) == 3
    path.write_bytes(b'{"a": 1}\n{"b": 2}')  # an editor that writes no last line end
    with Journal(path) as kept:
        kept.append({"c": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"a": 1},
        {"b": 2},
        {"c": 3},
    ]
    for wrong in (b'{"a": 1}\n{"b"\n{"c": 3}\n', b"[1]\n{}\n", b"\xff\n"):
        path.write_bytes(wrong)
        with pytest.raises(WeftError, match=r"line [12]"):
            Journal(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_two_processes_do_not_write_one_file(tmp_path):
    with Journal(tmp_path / "j.jsonl"), pytest.raises(ConfigError, match="another process"):
        Journal(tmp_path / "j.jsonl")
    Journal(tmp_path / "j.jsonl").__exit__(None, None, None)


@pytest.mark.skipif(sys.platform == "win32", reason="no kill -9")
def test_after_kill_9_only_the_request_in_flight_is_asked_again(tmp_path, capsys):
    with judge(lambda i, _: GRADED if i != 3 else ("hang", 30.0)) as seen:
        command = words(tmp_path, seen, "--json", str(tmp_path / "scores.json"))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        running = subprocess.Popen(
            [sys.executable, "-m", "weft", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=env,
        )
        for _ in range(6000):
            if len(seen.bodies) == 4 or running.poll() is not None:
                break
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert len(seen.bodies) == 4
        assert main(command) == 0
    assert len(seen.bodies) == 7 and seen.bodies[3] == seen.bodies[4]
    assert len({json.dumps(body) for body in seen.bodies}) == 6
    assert json.loads((tmp_path / "scores.json").read_text())["scores"]["average"] == 7
    assert "average" in capsys.readouterr().out


def test_the_command_says_what_is_missing_and_ends_with_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with judge(lambda i, _: GRADED if i < 2 else ("status", 401, {}, "no sk-secret")) as seen:
        status = main(
            words(tmp_path, seen, "--key-env", "JUDGE_KEY", "--json", str(tmp_path / "s.json"))
        )
    shown = capsys.readouterr()
    data = json.loads((tmp_path / "s.json").read_text())
    assert status == 1 and "JUDGE_KEY" in shown.out and "same command continues" in shown.err
    assert data["counts"] == {
        "answers": 6,
        "graded": 2,
        "unparsable": 0,
        "unanswered": 1,
        "not asked": 3,
    }
    assert data["scores"]["category math"] is None and data["reasons"]["category math"]
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "sk-secret" not in written + shown.out + shown.err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--adapter", "x"], "--model"),
        (["--set", "do_sample=True"], "--model"),
        (["--key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
        (["--tries", "0"], "--tries"),
        (["--judge-set", "messages=1"], "messages"),
        (["--prompts", "nowhere"], "nowhere"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_anything_is_asked(
    tmp_path, capsys, more, told
):
    with judge(lambda *_: GRADED) as seen:
        assert main(words(tmp_path, seen, *more)) == 2
    assert told in capsys.readouterr().err and seen.bodies == []


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"category": "a", "turns": ["x"]}, "question_id"),
        ({"question_id": 1, "category": "a", "turns": []}, "one or two non-empty turns"),
        ({"question_id": 1, "category": "a", "turns": "x"}, "list of texts"),
        (
            {"question_id": 1, "category": "a", "turns": ["x"], "reference": ["y", "z"]},
            "2 references",
        ),
    ],
)
def test_a_question_file_with_a_fault_names_the_row(tmp_path, row, told):
    path = tmp_path / "q.jsonl"
    path.write_text(
        json.dumps({"question_id": 0, "category": "a", "turns": ["w"]})
        + "\n"
        + json.dumps(row)
        + "\n"
    )
    with pytest.raises(WeftError, match=told) as caught:
        read_questions(path)
    assert "row 2" in str(caught.value)


def test_mt_bench_is_no_task_of_eval_or_score_and_they_say_whose(capsys, tmp_path):
    (tmp_path / "f").write_text("x\n")
    assert main(["eval", "--model", "x", "--task", "mt-bench"]) == 2
    assert (
        main(
            [
                "score",
                "--task",
                "mt-bench",
                "--references",
                str(tmp_path / "f"),
                "--outputs",
                str(tmp_path / "f"),
            ]
        )
        == 2
    )
    assert capsys.readouterr().err.count("weft judge") == 2


def test_the_benchmarks_own_files_are_read(shared, tmp_path):
    place = shared / "data" / "datasets" / "MT-Bench"
    questions = read_questions(place / "mt_bench_question.jsonl.gz")
    assert (
        len(questions) == 80
        and len({q.category for q in questions}) == 8
        and sum(len(q.turns) for q in questions) == 160
    )
    graded = read_questions(
        place / "mt_bench_question.jsonl.gz", place / "mt_bench_reference_gpt4.jsonl.gz"
    )
    assert {q.category for q in graded if q.references[0]} == {"math", "reasoning", "coding"}
    prompts = read_prompts(place / "judge_prompts.jsonl.gz")
    wanted = asks(
        graded, {q.id: q.turns for q in graded}, Endpoint("http://h/v1", "j"), prompts, "f"
    )
    assert len(wanted) == 160 and not any(
        "{" + field in a.messages[1]["content"]
        for a in wanted
        for field in ("question", "answer_", "ref_answer")
    )
    assert len(read_questions(place / "vicuna_bench_question.jsonl.gz")) == 80
