"""The prompts for a judge model: our own, and those of FastChat's judge_prompts.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import WeftError
from .files import columns, read_rows

# A judgment is stored under a digest of its prompt. After a change of these texts, all answers are
# graded again.
_SYSTEM = "You grade answers of an AI assistant. You are strict and fair, and it is all the same to you who wrote them."
_HOW = (
    "Give a grade from 1 (of no use) to 10 (nothing to improve). What counts: is the request "
    "fulfilled in every part, "
    "is what is said true, does it go deep enough, is it clear. Length alone earns "
    "nothing.{reference} Say in a few "
    "sentences what is good and what is wrong. Then write the grade in double square brackets on a "
    "last line of its "
    "own, in exactly this form:\nGrade: [[4]]"
)
_REFERENCE = (
    " Compare with the reference answer first and name each mistake; the reference is right, but "
    "another answer "
    "may be right too."
)
_ONE = "Grade the answer to this question.\n\n<question>\n{question}\n</question>\n\n"
_TWO = (
    "Grade the assistant's second answer in this conversation; the first is there for context "
    "only.\n\n"
    "<user>\n{question_1}\n</user>\n\n<assistant>\n{answer_1}\n</assistant>\n\n"
    "<user>\n{question_2}\n</user>\n\n<assistant>\n{answer_2}\n</assistant>\n\n"
)
_REF_ONE = "<reference>\n{ref_answer_1}\n</reference>\n\n"
_REF_TWO = "<reference turn=1>\n{ref_answer_1}\n</reference>\n\n<reference turn=2>\n{ref_answer_2}\n</reference>\n\n"
_ANSWER = "<answer>\n{answer}\n</answer>\n\n"
# By (turn, is there a reference): what the system message and the question to the judge are.
OURS = {
    (1, False): (_SYSTEM, _ONE + _ANSWER + _HOW.replace("{reference}", "")),
    (1, True): (_SYSTEM, _ONE + _REF_ONE + _ANSWER + _HOW.replace("{reference}", _REFERENCE)),
    (2, False): (_SYSTEM, _TWO + _HOW.replace("{reference}", "")),
    (2, True): (_SYSTEM, _TWO + _REF_TWO + _HOW.replace("{reference}", _REFERENCE)),
}
FASTCHAT = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}
Prompts = Mapping[tuple[int, bool], tuple[str, str]]


def read_prompts(path: Path) -> Prompts:
    """Reads the four prompts for single answers from FastChat's judge_prompts.jsonl. Raises
    WeftError if one is missing.
    """
    rows = {row.get("name"): row for row in read_rows(path)}
    missing = [name for name in FASTCHAT.values() if name not in rows]
    if missing:
        raise WeftError(f"{path} has no prompt named {missing}; it has {sorted(map(str, rows))}.")
    columns(
        [rows[name] for name in FASTCHAT.values()], str(path), "system_prompt", "prompt_template"
    )
    return {
        key: (str(rows[name]["system_prompt"]), str(rows[name]["prompt_template"]))
        for key, name in FASTCHAT.items()
    }
