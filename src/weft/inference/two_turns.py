"""Answers to questions of one or two turns by a chat model, saved as they come (`weft judge`).

The second turn follows the model's own first answer. As in MT-Bench, writing and roleplay are
sampled, stem and humanities nearly greedy, all else greedy. Sampled questions are answered one at a
time, each with its own seed, so an answer does not depend on earlier answers, in this run or in one
that was killed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.files import find
from ..checkpoint.tokenizer_files import TEMPLATE, lone_template, tokenizer_folder
from ..errors import ConfigError
from ..tasks.journal import Journal
from ..tasks.mt_bench import Question
from ..tasks.vocabulary import max_positions
from .generate import answer
from .opened import Opened, check_generates

# lm-sys/FastChat, llm_judge/common.py; other categories are decoded greedily.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
MAX_NEW_TOKENS = 1024


def maker(
    model: str, adapter: str | None, settings: Mapping[str, Any], seed: int, template: str | None
) -> dict[str, Any]:
    """Returns the settings on which answers depend besides their question. Answers of different
    makers are not mixed in one file.
    """
    template = template or _template_of(adapter)
    found = {
        "model": model,
        "adapter": None if adapter is None else _digest(find(adapter)[0].read_bytes()),
        "settings": dict(settings),
        "seed": seed,
        "template": None if template is None else _digest(template.encode()),
    }
    # As JSON returns it, for the comparison with the rows of the file.
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def check_kept(kept: Journal, made_by: Mapping[str, Any], questions: Sequence[Question]) -> None:
    """Raises ConfigError if the file has answers of another maker, or to other questions of the
    same id.
    """
    asked = {question.id: _digest(json.dumps(question.turns).encode()) for question in questions}
    for number, row in enumerate(kept.rows, start=1):
        other = row.get("made_by")
        if other != made_by:
            different = [
                f"{key}={value!r}"
                for key, value in (other or {}).items()
                if value != made_by.get(key)
            ]
            raise ConfigError(
                f"{kept.path}, row {number}: this answer was made differently "
                f"({', '.join(different) or 'unknown'}). Give another --out, or leave out --model "
                "to have these judged."
            )
        if asked.get(row.get("question_id", ""), row.get("asked")) != row.get("asked"):
            raise ConfigError(
                f"{kept.path}, row {number}: question {row['question_id']!r} has changed since it "
                "was answered. Give another --out."
            )


def answer_all(
    opened: Opened,
    questions: Sequence[Question],
    kept: Journal,
    made_by: Mapping[str, Any],
    batch: int = 8,
    on_progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Answers the questions that `kept` has no answer to, in FastChat's format. Each batch is on
    the disk before the next one begins.

    Raises WeftError if the model generates no text, if there is no chat template, or if a question
    exceeds the model's positions.
    """
    check_generates(opened.model)
    done = {row["question_id"] for row in kept.rows}
    waiting = [question for question in questions if question.id not in done]
    settings, seed = dict(made_by["settings"]), int(made_by["seed"])
    greedy = [q for q in waiting if not _sampled(_decoding(settings, q))]
    groups = [greedy[i : i + batch] for i in range(0, len(greedy), batch)]
    groups += [[question] for question in waiting if question not in greedy]
    for group in groups:
        torch.manual_seed(int(_digest(f"{seed}/{group[0].id}".encode()), 16) % 2**63)
        decoding = _decoding(settings, group[0])
        first = _turn(opened, [[q.turns[0]] for q in group], decoding)
        twice = [(q, text) for q, text in zip(group, first, strict=True) if len(q.turns) > 1]
        second = iter(
            _turn(opened, [[q.turns[0], text, q.turns[1]] for q, text in twice], decoding)
            if twice
            else []
        )
        for question, text in zip(group, first, strict=True):
            turns = [text, *([next(second)] if len(question.turns) > 1 else [])]
            kept.append(_row(question, turns, made_by))
        on_progress(f"{len(kept.rows)}/{len(questions)} questions answered")


def _row(question: Question, turns: list[str], made_by: Mapping[str, Any]) -> dict[str, Any]:
    asked = _digest(json.dumps(question.turns).encode())
    name = str(made_by["model"]) + (f" + {made_by['adapter']}" if made_by["adapter"] else "")
    return {
        "question_id": question.id,
        "answer_id": _digest(f"{asked}{name}".encode()),
        "model_id": name,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
        "asked": asked,
        "made_by": dict(made_by),
    }


def _decoding(settings: Mapping[str, Any], question: Question) -> dict[str, Any]:
    """MT-Bench's temperature for the category, unless the settings have one."""
    temperature = settings.get(
        "temperature", 0.0 if "num_beams" in settings else TEMPERATURES.get(question.category, 0.0)
    )
    usual = (
        {"do_sample": True, "temperature": temperature}
        if temperature and settings.get("do_sample", True)
        else {"do_sample": False}
    )
    return {
        "max_new_tokens": MAX_NEW_TOKENS,
        **usual,
        **{k: v for k, v in settings.items() if k != "temperature"},
    }


def _sampled(decoding: Mapping[str, Any]) -> bool:
    return bool(decoding["do_sample"])


def _turn(
    opened: Opened, conversations: Sequence[Sequence[str]], decoding: Mapping[str, Any]
) -> list[str]:
    """The next answer of each conversation (user, assistant, user, ...), limited to the positions
    that are left.
    """
    roles = ("user", "assistant")
    prompts = [
        opened.renderer.chat_prompt(
            [{"role": roles[i % 2], "content": text} for i, text in enumerate(talk)]
        )
        for talk in conversations
    ]
    bare = opened.renderer.bare()
    longest = max(len(bare.prompt_ids(prompt)) for prompt in prompts)
    new, positions = decoding["max_new_tokens"], max_positions(opened.model.config, opened.model)
    if positions is not None:
        new = max(1, min(new, positions - longest))
    texts = answer(opened.model, bare, prompts, {**decoding, "max_new_tokens": new}, len(prompts))
    return [text.strip() for text in texts]


def _template_of(adapter: str | None) -> str | None:
    """The chat template that an adapter brings, or None."""
    folder = tokenizer_folder(adapter)
    path = None if folder is None else folder / TEMPLATE
    if path is None or not path.is_file():
        return lone_template(adapter)
    return path.read_text(encoding="utf-8")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def read_template(path: str) -> str:
    """Reads a chat template. Raises ConfigError if there is no such file."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"--chat-template {path!r}: there is no such file.")
    return file.read_text(encoding="utf-8")
