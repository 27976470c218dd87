"""Two turns by our own model: the second follows the first, and what is answered stays as it is."""

import json

import pytest
import tiny

import weft
from judge_server import GRADED, judge
from weft.cli import main
from weft.errors import ConfigError
from weft.inference import two_turns
from weft.inference.opened import open_model
from weft.tasks.journal import Journal
from weft.tasks.mt_bench import Question

QUESTIONS = [
    Question(i, ("writing", "math", "coding")[i % 3], (f"say {i}", f"more {i}"), ("", ""))
    for i in range(5)
]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return str(tiny.language_model(tmp_path_factory.mktemp("lm")))


def answered(lm, path, *parts):
    made_by = two_turns.maker(lm, None, {"max_new_tokens": 6}, 3, None)
    opened = open_model(lm, None)
    for part in parts:
        with Journal(path) as kept:
            two_turns.check_kept(kept, made_by, QUESTIONS)
            two_turns.answer_all(opened, part, kept, made_by, batch=1)
            rows = list(kept.rows)
    return {row["question_id"]: row["choices"][0]["turns"] for row in rows}


def test_the_second_turn_follows_the_models_own_first_answer(lm, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        two_turns,
        "answer",
        lambda model, renderer, prompts, settings, batch: (
            asked.append((prompts, settings)) or [f" reply {len(asked)} " for _ in prompts]
        ),
    )
    found = answered(lm, tmp_path / "a", QUESTIONS[:2])
    assert found == {
        0: ["reply 3", "reply 4"],
        1: ["reply 1", "reply 2"],
    }  # what is greedy comes first
    talk = (
        "<|im_start|>user\nsay 1<|im_end|>\n<|im_start|>assistant\nreply 1<|im_end|>\n"
        "<|im_start|>user\nmore 1<|im_end|>\n<|im_start|>assistant\n"
    )
    assert asked[1][0] == [talk]
    assert asked[0][1] == {"max_new_tokens": 6, "do_sample": False}
    assert asked[2][1] == {"max_new_tokens": 6, "do_sample": True, "temperature": 0.7}


def test_answers_in_two_runs_are_those_of_one(lm, tmp_path):
    whole = answered(lm, tmp_path / "a", QUESTIONS)
    parts = answered(lm, tmp_path / "b", QUESTIONS[3:], QUESTIONS)
    assert whole == parts and all(len(turns) == 2 for turns in whole.values()) and len(whole) == 5
    assert len({str(turns) for turns in whole.values()}) > 1


def test_a_long_first_answer_leaves_the_second_what_room_there_is(lm, monkeypatch):
    given = []
    monkeypatch.setattr(
        two_turns,
        "answer",
        lambda model, renderer, prompts, settings, batch: (
            given.append(settings["max_new_tokens"]) or ["x" * 900]
        ),
    )
    opened = open_model(lm, None)
    two_turns._turn(opened, [["a"]], {"max_new_tokens": 1024, "do_sample": False})
    two_turns._turn(opened, [["a", "x" * 900, "b"]], {"max_new_tokens": 1024, "do_sample": False})
    assert 900 < given[0] < 1024 and 0 < given[1] < 124


def test_answers_of_another_model_adapter_or_question_are_not_mixed(lm, tmp_path):
    answered(lm, tmp_path / "a", QUESTIONS[:1])
    opened = open_model(lm, None).model
    weft.attach(opened, weft.LoRA(r=2))
    weft.save(opened, tmp_path / "adapter")
    with Journal(tmp_path / "a") as kept:
        usual = two_turns.maker(lm, None, {"max_new_tokens": 6}, 3, None)
        two_turns.check_kept(kept, usual, QUESTIONS)
        for other in (
            two_turns.maker(lm, str(tmp_path / "adapter"), {"max_new_tokens": 6}, 3, None),
            two_turns.maker(lm, None, {"max_new_tokens": 7}, 3, None),
            two_turns.maker("elsewhere", None, {"max_new_tokens": 6}, 3, None),
        ):
            with pytest.raises(ConfigError, match="another --out"):
                two_turns.check_kept(kept, other, QUESTIONS)
        with pytest.raises(ConfigError, match="has changed"):
            two_turns.check_kept(kept, usual, [Question(0, "math", ("say", "other"), ("", ""))])


def test_weft_judge_answers_and_then_judges_in_two_commands(lm, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    path, out = tmp_path / "q.jsonl", tmp_path / "out"
    path.write_text(
        "".join(
            json.dumps({"question_id": q.id, "category": q.category, "turns": q.turns}) + "\n"
            for q in QUESTIONS
        )
    )
    common = ["judge", "--questions", str(path), "--out", str(out)]
    answering = [*common, "--model", lm, "--max-new-tokens", "5", "--limit", "3"]
    assert main(answering) == 0
    first = (out / "answers.jsonl").read_bytes()
    assert main(answering) == 0 and (out / "answers.jsonl").read_bytes() == first
    assert (
        main([*answering[:-2], "--set", "num_beams=2"]) == 2
        and "another --out" in capsys.readouterr().err
    )
    with judge(lambda *_: GRADED) as seen:
        judging = ["--url", seen.url, "--judge", "j"]
        assert (
            main([*common, *judging]) == 1
            and "--limit" in capsys.readouterr().err
            and not seen.bodies
        )
        assert main([*common, *judging, "--limit", "3"]) == 0 and len(seen.bodies) == 6
        said = json.loads(first.splitlines()[0])["choices"][0]["turns"]
        assert any(said[0] in text and said[1] in text for text in seen.questions())
        assert main([*common, *judging, "--limit", "3"]) == 0 and len(seen.bodies) == 6
    assert main(common) == 2
