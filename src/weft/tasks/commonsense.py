"""Commonsense reasoning by generate-and-match, as in LLM-Adapters (arXiv:2304.01933) and the DoRA
paper (arXiv:2402.09353).

`commonsense:DIR` is all eight data sets (BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c,
OBQA) with one model for all; `boolq:DIR` and so on is one of them. It reads LLM-Adapters' files,
DIR/boolq/test.json with instruction, input, output, answer (and train.json, or the merged
DIR/commonsense_170k.json). Rows in the original authors' format are rendered to the same
instruction.

The prompt is that of commonsense_evaluate.py, character by character, with its indentation. The
released training script has other spaces at two line ends; here one prompt is used for both. An
answer is right if the first key word of its data set ("true", "answer3") in the generated text is
the right one. Without a key word it is wrong. Decoding: beam 4, at most 32 tokens. The script also
sets temperature, top-p and top-k, without effect since it does not sample. The average is
unweighted.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import WeftError
from .base import SPLIT_SEED
from .files import Row, columns, find_file, hub_rows, is_table, read_lines, read_rows
from .generation import GenerationTask, Record, Report, Sample

# name of the task: (folder in LLM-Adapters, name and configuration on the hub, key word, number of
# key words)
SETS = {
    "boolq": ("boolq", "google/boolq", None, "true|false", 0),
    "piqa": ("piqa", "ybisk/piqa", None, "solution", 2),
    "siqa": ("social_i_qa", "allenai/social_i_qa", None, "answer", 5),
    "hellaswag": ("hellaswag", "Rowan/hellaswag", None, "ending", 4),
    "winogrande": ("winogrande", "allenai/winogrande", "winogrande_xl", "option", 2),
    "arc-e": ("ARC-Easy", "allenai/ai2_arc", "ARC-Easy", "answer", 5),
    "arc-c": ("ARC-Challenge", "allenai/ai2_arc", "ARC-Challenge", "answer", 5),
    "obqa": ("openbookqa", "allenai/openbookqa", "main", "answer", 5),
}
MERGED = ("commonsense_170k", "commonsense_15k")
# training examples for validation, as in the papers' scripts; which ones they are differs: the seed is ours
HELD_OUT = 120
GENERATION = {"num_beams": 4, "max_new_tokens": 32, "do_sample": False}
ANSWERED = "the correct answer is "
_START = "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
_START_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a "
    "response that appropriately completes the request.\n\n"
)
_INDENT = " " * 16


def load_commonsense(source: Path | str | None, name: str) -> GenerationTask:
    """Loads a task. `name` is "commonsense" or one of SETS; `source` is a folder, a hub name, or
    None for the data sets on the hub.

    Raises WeftError if a data set is missing or a row has neither format.
    """
    wanted = list(SETS) if name == "commonsense" else [name]
    if not isinstance(source, Path):
        read = {one: _from_hub(source or SETS[one][1], one) for one in wanted}
    else:
        read = {
            one: found
            for one in wanted
            if (found := _from_folder(source, one, alone=len(wanted) == 1))
        }
    if not read:
        raise WeftError(
            f"{name}:{source}: none of {[SETS[one][0] for one in wanted]} has a test or train "
            "file. DIR/boolq/test.json and so on are the files of LLM-Adapters."
        )
    samples = [sample for one in read for sample in read[one].get("train", [])]
    if (
        name == "commonsense"
        and isinstance(source, Path)
        and (path := find_file(source, MERGED)) is not None
    ):
        samples = [
            _sample(row, None, f"{path}, row {i}") for i, row in enumerate(read_rows(path), start=1)
        ]
    train, validation = _divide(samples)
    records: dict[str, list[Record]] = {"validation": validation} if validation else {}
    records["test"] = [_record(sample, one) for one in read for sample in read[one].get("test", [])]
    missing = [one for one in wanted if not read.get(one, {}).get("test")]
    notes = (
        (f"no test data for {', '.join(missing)}; the average is over the others.",)
        if missing
        else ()
    )
    records = {split: held for split, held in records.items() if held}
    return GenerationTask(
        f"{name}:{source or 'hub'}",
        train,
        records,
        GENERATION,
        "accuracy",
        score_commonsense,
        notes,
        is_right_answer,
    )


def _from_folder(folder: Path, one: str, alone: bool) -> dict[str, list[Sample]]:
    place = folder / SETS[one][0]
    place = folder if alone and not place.is_dir() else place
    found = {}
    for split, stems in (("train", ("train",)), ("test", ("test", "validation", "dev"))):
        path = find_file(place, stems)
        if path is not None:
            found[split] = [
                _sample(row, one, f"{path}, row {i}")
                for i, row in enumerate(read_rows(path), start=1)
            ]
    return found


def _from_hub(source: str, one: str) -> dict[str, list[Sample]]:
    """Reads the hub's validation split if its test labels are hidden, as the papers do."""
    found = {}
    for split, stems in (("train", ("train",)), ("test", ("test", "validation"))):
        for stem in stems:
            rows = hub_rows(source, SETS[one][2], stem)
            if rows and split not in found and not _hidden(rows[0]):
                found[split] = [
                    _sample(row, one, f"{source}, {stem}, row {i}")
                    for i, row in enumerate(rows, start=1)
                ]
    return found


def _hidden(row: Row) -> bool:
    return any(row.get(key) in ("", "-1", -1) for key in ("label", "answer", "answerKey"))


def _divide(samples: Sequence[Sample]) -> tuple[list[Sample], list[Record]]:
    """Returns training samples and validation records. Small training sets give no validation
    records.
    """
    if len(samples) < 10 * HELD_OUT:
        return list(samples), []
    held = set(random.Random(f"{SPLIT_SEED}/commonsense").sample(range(len(samples)), HELD_OUT))
    return (
        [sample for i, sample in enumerate(samples) if i not in held],
        [_record(samples[i], "validation") for i in sorted(held)],
    )


def _record(sample: Sample, group: str) -> Record:
    return {
        "prompt": sample["prompt"],
        "references": [sample["completion"].removeprefix(ANSWERED)],
        "group": group,
        "completion": sample["completion"],
    }


def _sample(row: Row, one: str | None, where: str) -> Sample:
    if "instruction" not in row and one is not None:
        instruction, answer = RENDER[one](row)
        row = {"instruction": instruction, "input": "", "answer": answer}
    columns([row], where, "instruction", "answer")
    answer = str(row["answer"]).strip().lower()
    if not _keywords(answer):
        raise WeftError(
            f"{where}: the answer {answer!r} is not a key word such as true, solution1, answer3."
        )
    return {
        "prompt": instruction_prompt(row["instruction"], row.get("input") or ""),
        "completion": ANSWERED + answer,
    }


def instruction_prompt(instruction: str, context: str = "") -> str:
    """Returns the instruction in the papers' prompt, up to the answer."""
    middle = f"{_INDENT}### Input:\n{_INDENT}{context}\n\n" if context else ""
    start = _START_INPUT if context else _START
    return f"{start}{_INDENT}### Instruction:\n{_INDENT}{instruction}\n\n{middle}{_INDENT}### Response:\n{_INDENT}"


def _keywords(answer: str) -> str:
    """Returns the pattern of all key words of this answer's data set, or "" if it is not a key
    word.
    """
    if answer in ("true", "false"):
        return "true|false"
    stem, digit = answer[:-1], answer[-1:]
    most = max((most for *_, word, most in SETS.values() if word == stem), default=0)
    return f"{stem}[1-{most}]" if digit.isdigit() and 1 <= int(digit) <= most else ""


def extract(output: str, answer: str) -> str:
    """Returns the first key word in a text, or "". `answer` is the right one, and decides which key
    words count.
    """
    found = re.search(_keywords(answer), output)
    return found[0] if found else ""


def is_right_answer(output: str, record: Record) -> bool:
    """Returns True if the first key word of the output is that of the reference."""
    wanted = record["references"][0].strip().lower().removeprefix(ANSWERED)
    return extract(output, wanted) == wanted


def score_commonsense(outputs: Sequence[str], records: Sequence[Record]) -> Report:
    """Returns the accuracy in [0, 1]: the mean over data sets, and that of each data set if there
    are several.
    """
    right: dict[str, list[bool]] = {}
    for output, record in zip(outputs, records, strict=True):
        right.setdefault(record.get("group", ""), []).append(is_right_answer(output, record))
    each = {group: sum(marks) / len(marks) for group, marks in right.items()}
    average = sum(each.values()) / len(each)
    return Report(
        {
            "accuracy": average,
            **({f"accuracy {k}": v for k, v in each.items()} if len(each) > 1 else {}),
        }
    )


def read_commonsense_references(path: Path) -> list[Record]:
    """Reads the answers: the column answer of a table, or one per line ("answer3").

    Raises WeftError if an answer is not one of the key words.
    """
    answers = _column(path, "answer")
    known = [bool(_keywords(answer.lower().removeprefix(ANSWERED))) for answer in answers]
    wrong = known.index(False) + 1 if False in known else None
    if wrong is not None:
        raise WeftError(
            f"{path}, {'row' if is_table(path) else 'line'} {wrong}: {answers[wrong - 1][:40]!r} "
            "is not a key word such as true, solution1, answer3."
        )
    return [{"prompt": "", "references": [answer]} for answer in answers]


def read_commonsense_outputs(path: Path) -> list[str]:
    """Reads generated text: one per line, or the column output_pred (as in the papers' script) or
    output.
    """
    if not is_table(path):
        return read_lines(path)
    return _column(path, "output_pred" if "output_pred" in read_rows(path)[0] else "output")


def _column(path: Path, name: str) -> list[str]:
    if not is_table(path):
        return read_lines(path)
    rows = read_rows(path)
    columns(rows, str(path), name)
    return [str(row[name]) for row in rows]


def _choice(question: str, word: str, options: Sequence[str], gap: str = " ") -> str:
    listed = gap.join(f"{word.capitalize()}{i}: {text}" for i, text in enumerate(options, start=1))
    return f"{question}\n\n{listed}\n\nAnswer format: {'/'.join(f'{word}{i}' for i in range(1, len(options) + 1))}"


def _boolq(row: Row) -> tuple[str, str]:
    asked = f"Please answer the following question with true or false, question: {row['question']}?"
    return f"{asked}\n\nAnswer format: true/false", str(row["answer"]).lower()


def _piqa(row: Row) -> tuple[str, str]:
    asked = f"Please choose the correct solution to the question: {row['goal']}"
    return _choice(
        asked, "solution", [row["sol1"], row["sol2"]], "\n\n"
    ), f"solution{int(row['label']) + 1}"


def _siqa(row: Row) -> tuple[str, str]:
    asked = f"Please choose the correct answer to the question: {row['context']} {row['question']}"
    return _choice(
        asked, "answer", [row[f"answer{c}"] for c in "ABC"]
    ), f"answer{int(row['label'])}"


def _hellaswag(row: Row) -> tuple[str, str]:
    asked = f"Please choose the correct ending to complete the given sentence: {row['activity_label']}: {row['ctx']}"
    return _choice(asked, "ending", row["endings"]), f"ending{int(row['label']) + 1}"


def _winogrande(row: Row) -> tuple[str, str]:
    asked = f"Please choose the correct answer to fill in the blank to complete the given sentence: {row['sentence']}"
    return (
        (
            f"{asked}\n\nOption1: {row['option1']} Option2: {row['option2']} Answer format: "
            "option1/option2"
        ),
        f"option{row['answer']}",
    )


def _multiple(row: Row) -> tuple[str, str]:
    """ARC and OBQA, with letters or digits as labels."""
    choices: Mapping[str, Any] = row["choices"]
    asked = f"Please choose the correct answer to the question: {row.get('question') or row['question_stem']}"
    return _choice(
        asked, "answer", choices["text"]
    ), f"answer{list(choices['label']).index(row['answerKey']) + 1}"


RENDER: dict[str, Callable[[Row], tuple[str, str]]] = {
    "boolq": _boolq,
    "piqa": _piqa,
    "siqa": _siqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "arc-e": _multiple,
    "arc-c": _multiple,
    "obqa": _multiple,
}
