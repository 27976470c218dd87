"""Questions with options: TVQA, How2QA, ScienceQA, MMBench. Accuracy in percent."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import WeftError
from ..generation import Report
from . import by_id

LETTERS = "ABCDE"
_SAYS = re.compile(r"The answer is ([A-E])")
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_LAST = 4  # the last words of an output, among which a letter counts as its choice


def stated_letter(output: str) -> str | None:
    """Returns the letter A to E that an output is, begins with ("B. ..."), or states ("The answer
    is B"), else None. Source: LLaVA's script of ScienceQA.
    """
    found = output.replace("\n", ". ")
    if found.strip() in tuple(LETTERS):
        return found.strip()
    if len(found) >= 3 and found[0] in LETTERS and found[1:3] == ". ":
        return found[0]
    said = _SAYS.search(found)
    return None if said is None else said.group(1)


def chosen_option(output: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter of the option that an output chooses, or None: the only letter of an
    option among its words, if it is one of the last four; else the only option whose text it
    contains. `options` are texts by letter. Source: VLMEvalKit's matching without a judge, as
    MMBench uses it.
    """
    if any(refusal in output for refusal in _REFUSALS):
        return None
    words = output.translate(_MARKS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - _LAST - 1:
        return letters[0]
    text = output.lower()
    if len(text) > 2 * sum(len(option) for option in options.values()):
        return None
    found = [letter for letter, option in options.items() if option.lower() in text]
    return found[0] if len(found) == 1 else None


def score_indices(references: Path, outputs: Path) -> Report:
    """Scores `{qid: index}` against VALUE's JSON lines with `qid` and `answer_idx` (TVQA, How2QA).
    Raises WeftError.
    """
    wanted = by_id.by_id(references, by_id.rows(references), ("qid",), ("answer_idx",))
    found = by_id.read_json(outputs)
    if not isinstance(found, dict):
        raise WeftError(f"{outputs}: not an object with one index per question, {{qid: index}}.")
    ids = by_id.matched(references, wanted, outputs, found)
    wrong = next((name for name in ids if type(found[name]) is not int), None)
    if wrong is not None:
        raise WeftError(f"{outputs}, id {wrong!r}: {found[wrong]!r} is no index of a choice.")
    return _percent([found[name] == wanted[name] for name in ids])


def score_scienceqa(references: Path, outputs: Path) -> Report:
    """Scores JSON lines with `question_id` and `text` against problems.json; if pid_splits.json is
    beside it, its test part is meant. "accuracy, images" is that of questions with an image, as in
    LLaVA's table. Raises WeftError.
    """
    problems = by_id.read_json(references)
    if not isinstance(problems, dict):
        raise WeftError(f"{references}: not ScienceQA's problems.json, an object by problem id.")
    splits = references.with_name("pid_splits.json")
    if splits.is_file():
        problems = {name: problems[name] for name in by_id.read_json(splits)["test"]}
    found = by_id.by_id(outputs, by_id.rows(outputs), ("question_id",), ("text",))
    right, images = [], []
    for name in by_id.matched(references, problems, outputs, found):
        problem = _problem(references, name, problems[name])
        letter = stated_letter(by_id.text(outputs, name, found[name]))
        right.append(letter == LETTERS[problem["answer"]])
        images.append(bool(problem.get("image")))
    report = _percent(right)
    of_images = [one for one, image in zip(right, images, strict=True) if image]
    report.scores["accuracy, images"] = 100 * sum(of_images) / len(of_images) if of_images else None
    if not of_images:
        report.reasons["accuracy, images"] = "no question has an image"
    return report


def _problem(path: Path, name: str, value: Any) -> Mapping[str, Any]:
    answer = value.get("answer") if isinstance(value, dict) else None
    if type(answer) is not int or not 0 <= answer < min(
        len(value.get("choices", ())), len(LETTERS)
    ):
        raise WeftError(f"{path}, problem {name!r}: 'answer' is no index of its 'choices'.")
    found: Mapping[str, Any] = value
    return found


def score_mmbench(references: Path, outputs: Path) -> Report:
    """Scores outputs (`index` or `question_id`, and `prediction` or `text`) against MMBench's .tsv
    with `index`, the options A to D and `answer`. A question is right if it is in each order of its
    options: rows whose index is the same modulo a million (circular evaluation). Raises WeftError.
    """
    listed = by_id.rows(references)
    wanted = by_id.by_id(references, listed, ("index",), ("answer",))
    options = {
        str(row["index"]): {x: str(row[x]) for x in LETTERS if row.get(x) not in (None, "")}
        for row in listed
    }
    names = ("index", "question_id"), ("prediction", "text")
    found = by_id.by_id(outputs, by_id.rows(outputs), *names)
    circles: dict[int, list[bool]] = defaultdict(list)
    for name in by_id.matched(references, wanted, outputs, found):
        if not name.isdecimal():
            raise WeftError(f"{references}: the index {name!r} is no number.")
        choice = chosen_option(by_id.text(outputs, name, found[name]), options[name])
        circles[int(name) % 1_000_000].append(choice == wanted[name])
    return _percent([all(circle) for circle in circles.values()])


def _percent(right: Sequence[bool]) -> Report:
    return Report({"accuracy": 100 * sum(right) / len(right)}, notes=("Accuracy in percent.",))


SCORERS = {
    "how2qa": score_indices,
    "tvqa": score_indices,
    "scienceqa": score_scienceqa,
    "mmbench": score_mmbench,
}
