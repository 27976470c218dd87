"""Training and use see the same text: the run's tokenizer and chat template go with its adapter."""

import json
import shutil
from datetime import datetime, timezone

import chat_templates
import pytest
import tiny

import weft
from weft.cli import main
from weft.encoding import template as clock
from weft.errors import ConfigError, WeftError
from weft.inference import generate as generation
from weft.inference.opened import open_model
from weft.inference.two_turns import maker
from weft.training.config.read import from_dict
from weft.training.previews import preview
from weft.training.run import train

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
OURS = (
    "{% for m in messages %}<|im_start|>[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>[assistant] {% endif %}"
)
PROMPT = "<|im_start|>[user] hi<|im_end|><|im_start|>[assistant] "


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny.language_model(folder / "lm")
    (folder / "ours.jinja").write_text(OURS)
    (folder / "chat.jsonl").write_text((json.dumps({"messages": CHAT}) + "\n") * 8)
    return folder


def config(place, out, **changes):
    data = {"train": str(place / "chat.jsonl"), "chat_template": str(place / "ours.jinja")}
    plain = {
        "out": str(out),
        "model": {"path": str(place / "lm"), **changes.pop("model", {})},
        "method": {"name": "LoRA", "r": 2},
        "data": {**data, **changes.pop("data", {})},
        "train": {"steps": 4, "batch": 4, "device": "cpu"},
        **changes,
    }
    return from_dict(plain)


@pytest.fixture(scope="module")
def run(place):
    out = place / "run"
    best = {"data": {"eval_share": 0.25}, "eval": {"best": "loss", "every": 1}}
    train(config(place, out, save={"every": 1}, **best))
    return out


def prompts_of(model, adapter, monkeypatch, *more):
    seen = []
    monkeypatch.setattr(
        generation,
        "answer",
        lambda model, renderer, prompts, settings, batch: seen.extend(prompts) or ["x"],
    )
    options = ["--model", str(model), "--prompt", "hi", "--chat", "--device", "cpu", *more]
    assert main(["generate", *options, *(["--adapter", str(adapter)] if adapter else [])]) == 0
    return seen


@pytest.mark.parametrize("part", ["", "adapter", "best", "checkpoints/checkpoint-1"])
def test_every_adapter_of_a_run_generates_with_the_runs_template(place, run, part, monkeypatch):
    assert prompts_of(place / "lm", run / part, monkeypatch) == [PROMPT]
    assert open_model(str(place / "lm"), str(run / part)).tokenizer.chat_template == OURS


def test_the_base_alone_and_an_adapter_without_tokenizer_have_the_bases(
    place, run, tmp_path, monkeypatch
):
    theirs = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(run / "adapter" / name, tmp_path / name)
    assert prompts_of(place / "lm", None, monkeypatch) == [theirs]
    assert prompts_of(place / "lm", tmp_path, monkeypatch) == [theirs]
    (tmp_path / "chat_template.jinja").write_text(OURS)
    assert prompts_of(place / "lm", tmp_path, monkeypatch) == [PROMPT]


def test_merged_and_exported_models_bring_it(place, run, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    for part in ("adapter", "best"):
        out = tmp_path / part
        arguments = ["--model", str(place / "lm"), "--adapter", str(run / part), "--out", str(out)]
        assert main(["merge", *arguments]) == 0
        assert AutoTokenizer.from_pretrained(out).chat_template == OURS
        assert prompts_of(out, None, monkeypatch) == [PROMPT]
        exported = tmp_path / f"{part}-exported"
        weft.export(run / part, "lora", exported)
        assert prompts_of(place / "lm", exported, monkeypatch) == [PROMPT]
    weft.load(open_model(str(place / "lm"), None).model, exported)


def test_answers_for_a_judge_know_the_template_that_made_them(place, run):
    with_ours = maker("m", str(run / "adapter"), {}, 0, None)
    assert with_ours["template"] == maker("m", str(run / "best"), {}, 0, OURS)["template"]
    assert with_ours["template"] is not None
    assert maker("m", None, {}, 0, None)["template"] is None


def test_another_tokenizer_of_the_run_is_used_later_too(place, tmp_path, monkeypatch):
    other = chat_templates.tokenizer("{{ 'B' }}" + tiny.CHATML)
    other.save_pretrained(tmp_path / "tokenizer")
    shutil.copy(place / "lm" / "config.json", tmp_path / "tokenizer" / "config.json")
    changes = {"model": {"tokenizer": str(tmp_path / "tokenizer")}, "data": {"chat_template": None}}
    done = train(config(place, tmp_path / "run", **changes))
    shutil.rmtree(tmp_path / "tokenizer")
    assert prompts_of(place / "lm", done.out, monkeypatch)[0].startswith("B<|im_start|>user")


def test_the_card_loads_the_tokenizer_of_the_adapter(run):
    card = (run / "README.md").read_text()
    assert 'tokenizer = AutoTokenizer.from_pretrained("adapter")' in card


def test_the_preview_says_what_the_template_adds_and_counts_blank_answers(place, tmp_path):
    (tmp_path / "q.jinja").write_text(chat_templates.QWEN3)
    rows = [{"messages": CHAT}, {"messages": [CHAT[0], {**CHAT[1], "content": ""}]}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"train": str(tmp_path / "d.jsonl"), "chat_template": str(tmp_path / "q.jinja")}
    text = preview(config(place, tmp_path / "o", data=files))
    assert "assistant\n⟦<think>\n\n</think>\n\nyo<|im_end|>⟧\n" in text
    assert "note: in the loss, but added by the chat template itself: '<think>" in text
    assert "2 samples (messages); " in text and "blank answer 1" in text
    assert "training: 1 of 2 samples with an answer that is empty or blank" in text


def test_a_run_with_a_date_is_resumed_on_another_day(place, tmp_path, monkeypatch):
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + tiny.CHATML)
    files = {"chat_template": str(tmp_path / "t.jinja")}
    settings = config(place, tmp_path / "run", data=files, save={"every": 1})
    whole = train(settings)
    record = json.loads((whole.out / "run.json").read_text())
    assert any("prints the date" in note for note in record["notes"])
    shutil.rmtree(whole.out / "adapter")
    shutil.rmtree(whole.out / "checkpoints" / "checkpoint-4")

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2031, 1, 2, tzinfo=tz or timezone.utc)

    monkeypatch.setattr(clock, "datetime", Later)
    again = train(settings, go_on=True)
    assert again.finished
    assert json.loads((whole.out / "run.json").read_text())["rendered_at"] == record["rendered_at"]
    assert (
        open_model(str(place / "lm"), str(whole.out))
        .renderer.chat_prompt(CHAT[:1])
        .startswith("02 Jan 2031")
    )


def test_a_template_that_is_no_text_is_named(place, tmp_path):
    (tmp_path / "bad.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"data.chat_template='.*bad.jinja' cannot be read"):
        preview(config(place, tmp_path / "o", data={"chat_template": str(tmp_path / "bad.jinja")}))


def test_a_bare_tokenizer_directory_is_a_tokenizer(place, tmp_path):
    other = chat_templates.tokenizer("{{ 'B' }}" + tiny.CHATML)
    other.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "config.json").exists()
    changes = {"model": {"tokenizer": str(tmp_path / "bare")}, "data": {"chat_template": None}}
    assert "B<|im_start|>user" in preview(config(place, tmp_path / "run", **changes))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"notes.txt": "x"}, r"^model.tokenizer='.*': this directory has no tokenizer.*notes.txt"),
        (
            {"tokenizer.json": "{", "tokenizer_config.json": "{}"},
            r"^model.tokenizer '.*' could not",
        ),
        (None, r"^model.tokenizer='.*': there is no such tokenizer"),
    ],
)
def test_a_tokenizer_that_is_none_is_named_as_such(place, tmp_path, files, says):
    for name, text in (files or {}).items():
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / name).write_text(text)
    changes = {"model": {"tokenizer": str(tmp_path / "t")}}
    with pytest.raises(WeftError, match=says) as error:
        preview(config(place, tmp_path / "run", **changes))
    assert "\n" not in str(error.value)


def test_an_adapter_that_lost_the_tokenizer_of_its_run_says_so(place, run, tmp_path, capsys):
    shutil.copytree(run / "checkpoints" / "checkpoint-1", tmp_path / "copied")
    model = open_model(str(place / "lm"), str(run)).model
    weft.save(model, tmp_path / "saved", name=next(iter(weft.adapters(model))))
    for lost in ("copied", "saved"):
        options = ["--model", str(place / "lm"), "--adapter", str(tmp_path / lost)]
        assert main(["generate", *options, "--prompt", "hi", "--chat", "--device", "cpu"]) == 0
        assert "note: the adapter comes without a tokenizer" in capsys.readouterr().err
        assert main(["merge", *options, "--out", str(tmp_path / f"{lost}-merged")]) == 0
        assert "comes without a tokenizer" in " ".join(capsys.readouterr().out.split())
    for adapter in (run, run / "best", None):
        opened = open_model(str(place / "lm"), None if adapter is None else str(adapter))
        assert not any("tokenizer" in note for note in opened.notes)
