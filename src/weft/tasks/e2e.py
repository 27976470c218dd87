"""`e2e:DIR`: the E2E NLG challenge, restaurant descriptions from slots, with several references per
meaning.

It reads the challenge's tables (trainset.csv, devset.csv, testset_w_refs.csv: columns mr, ref) and
the files of the LoRA paper's code (train.txt, valid.txt, test.txt: "name : Alimentum | area : city
centre||Alimentum is ..."). Both give the second form as prompt. The code puts GPT-2's end-of-text
token between prompt and text; a task knows no tokenizer, so here it is a line break. Decoding: LoRA
paper, table 11, with the length penalty 0.8 of its code's README, and at most 64 new tokens.

The score is the challenge's own: BLEU, NIST, METEOR, ROUGE-L and CIDEr as e2e-metrics prints them
(`ngram_scores`, `caption_scores`). Sources: arXiv:1706.09254, arXiv:2106.09685 appendix D.3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from ..errors import WeftError
from .caption_scores import caption_scores
from .files import columns, find_splits, hub_rows, is_table, read_lines, read_rows
from .generation import GenerationTask, Record, Report, grouped
from .ngram_scores import bleu, nist

HUB = "tuetschek/e2e_nlg"
SPLITS = {
    "train": ("trainset", "train"),
    "validation": ("devset", "valid", "dev", "validation"),
    "test": ("testset_w_refs", "test"),
}
GENERATION = {
    "num_beams": 10,
    "length_penalty": 0.9,
    "no_repeat_ngram_size": 4,
    "repetition_penalty": 1.0,
    "max_new_tokens": 64,
    "do_sample": False,
}
METRICS = ("BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr")
SEPARATOR = "\n"
_SLOT = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]\s*(?:,|$)")
_NAMES = {"eatType": "Type", "familyFriendly": "family friendly", "priceRange": "price"}
_COLUMNS = (
    ("mr", "ref"),
    ("meaning_representation", "human_reference"),
    ("meaning_representation", "target"),
)


def load_e2e(source: Path | str = HUB) -> GenerationTask:
    """Loads from a folder or by name from the hub. Raises WeftError if no file has one of the names
    above, or with the invalid line.
    """
    name = f"e2e:{source}"
    if isinstance(source, Path):
        held = {
            split: read_pairs(path) for split, path in find_splits(source, SPLITS, name).items()
        }
    else:
        rows = {split: hub_rows(source, None, split) for split in SPLITS}
        held = {
            split: _pairs(found, f"{source}, {split}") for split, found in rows.items() if found
        }
    rendered = {
        split: [(meaning_prompt(mr), ref) for mr, ref in pairs] for split, pairs in held.items()
    }
    samples = [{"prompt": prompt, "completion": ref} for prompt, ref in rendered.pop("train", [])]
    records = {split: grouped(pairs) for split, pairs in rendered.items()}
    return GenerationTask(name, samples, records, GENERATION, "BLEU", score_e2e)  # type: ignore[arg-type]


def meaning_prompt(mr: str) -> str:
    """Returns a meaning in either notation as "name : Alimentum | area : city centre" and a line
    break.
    """
    if "[" in mr:
        slots = [(key.strip(), value.strip()) for key, value in _SLOT.findall(mr)]
        mr = " | ".join(f"{_NAMES.get(key, key)} : {_spaced(value)}" for key, value in slots)
    return mr.strip() + SEPARATOR


def _spaced(value: str) -> str:
    """£20-25 as in the LoRA paper's data: £ 20 - 25."""
    return re.sub(
        r"£\s*(\d+)(?:-(\d+))?", lambda m: f"£ {m[1]}" + (f" - {m[2]}" if m[2] else ""), value
    )


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Returns (meaning, reference) of every row. Raises WeftError with the invalid line."""
    if not is_table(path):
        pairs = []
        for number, line in enumerate(read_lines(path), start=1):
            mr, bars, ref = line.partition("||")
            if not bars or not mr.strip() or not ref.strip():
                raise WeftError(f"{path}, line {number}: {line[:60]!r} is not MEANING||REFERENCE.")
            pairs.append((mr.strip(), ref.strip()))
        return pairs
    return _pairs(read_rows(path), str(path))


def _pairs(rows: Sequence[dict[str, object]], where: str) -> list[tuple[str, str]]:
    names = next((pair for pair in _COLUMNS if all(name in rows[0] for name in pair)), _COLUMNS[0])
    columns(rows, where, *names)
    return [(str(row[names[0]]).strip(), str(row[names[1]]).strip()) for row in rows]


def score_e2e(outputs: Sequence[str], records: Sequence[Record]) -> Report:
    """Returns the five metrics of e2e-metrics. METEOR is None without Java, with the reason in the
    report.
    """
    references = [record["references"] for record in records]
    captions = caption_scores(outputs, references)
    scores = {
        "BLEU": bleu(outputs, references),
        "NIST": nist(outputs, references),
        **captions.scores,
    }
    return Report({name: scores[name] for name in METRICS}, captions.reasons, captions.notes)


def read_e2e_references(path: Path) -> tuple[list[list[str]], list[str] | None]:
    """Returns the references per segment, and their meanings if the file has them.

    The file is a table with mr and ref (consecutive equal meanings are one segment),
    MEANING||REFERENCE lines, or plain lines with an empty line between segments (without any: one
    per segment). Raises WeftError for two consecutive empty lines, which are a segment without
    references.
    """
    lines = [] if is_table(path) else read_lines(path)
    if is_table(path) or (lines and all("||" in line for line in lines)):
        groups = [
            (mr, [ref for _, ref in rows])
            for mr, rows in groupby(read_pairs(path), key=lambda pair: pair[0])
        ]
        return [refs for _, refs in groups], [mr for mr, _ in groups]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise WeftError(f"{path}: it has no reference.")
    if "" not in lines:
        return [[line] for line in lines], None
    found: list[list[str]] = [[]]
    for number, line in enumerate(lines, start=1):
        if line:
            found[-1].append(line)
        elif not found[-1]:
            raise WeftError(
                f"{path}, line {number}: an empty line ends a segment, and this one has no "
                "reference before it."
            )
        else:
            found.append([])
    return found, None


def read_e2e_outputs(path: Path, meanings: Sequence[str] | None) -> list[str]:
    """Returns one output per line, or those of a table with mr and an output, in the order of
    `meanings`.

    Raises WeftError if the table has other meanings or more than one output for one.
    """
    if not is_table(path):
        return read_lines(path)
    rows = read_rows(path)
    column = next(
        (name for name in ("output", "ref", "out", "reference", "system") if name in rows[0]),
        "output",
    )
    columns(rows, str(path), column)
    if meanings is None or "mr" not in rows[0]:
        return [str(row[column]).strip() for row in rows]
    held = {str(row["mr"]).strip(): str(row[column]).strip() for row in rows}
    missing = [mr for mr in meanings if mr not in held]
    if missing:
        raise WeftError(
            f"{path}: no output for {len(missing)} of the {len(meanings)} meanings, the first "
            f"{missing[0]!r}."
        )
    return [held[mr] for mr in meanings]
