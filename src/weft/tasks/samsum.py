"""`samsum:DIR`: SAMSum, summaries of chats (arXiv:1911.12237), as in the LoRA paper's GPT-3 table.

It reads the authors' files (train.json, val.json, test.json), or the same rows as jsonl, csv or
parquet: dialogue, summary. Rendering: LoRA paper, appendix C: one utterance per line, an empty
line, the summary. ROUGE is the F measure of the package `rouge-score` with its stemmer, as most
papers report it. The paper's script and its decoding are unknown; beam 4 is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .files import Row, columns, find_splits, hub_rows, is_table, read_lines, read_rows
from .generation import GenerationTask, Record, Report, Sample, references_only

HUB = "knkarthick/samsum"
SPLITS = {"train": ("train",), "validation": ("val", "validation", "dev"), "test": ("test",)}
GENERATION = {"num_beams": 4, "max_new_tokens": 128, "do_sample": False}
METRICS = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}


def load_samsum(source: Path | str = HUB) -> GenerationTask:
    """Loads from a folder or by name from the hub. Raises WeftError if files are missing or a row
    lacks a field.
    """
    name = f"samsum:{source}"
    if isinstance(source, Path):
        held = {
            split: (read_rows(path), str(path))
            for split, path in find_splits(source, SPLITS, name).items()
        }
    else:
        rows = {split: hub_rows(source, None, split) for split in SPLITS}
        held = {split: (found, f"{source}, {split}") for split, found in rows.items() if found}
    for found, where in held.values():
        columns(found, where, "dialogue", "summary")
    train, _ = held.pop("train", ([], ""))
    samples: list[Sample] = [
        {"prompt": dialogue_prompt(row), "completion": str(row["summary"]).strip()} for row in train
    ]
    records: dict[str, list[Record]] = {
        split: [
            {"prompt": dialogue_prompt(row), "references": [str(row["summary"]).strip()]}
            for row in found
        ]
        for split, (found, _) in held.items()
    }
    return GenerationTask(
        name,
        samples,
        records,
        GENERATION,
        "ROUGE-1",
        score_samsum,
        ("SAMSum: decoding with beam 4; the paper's is unknown.",),
    )


def dialogue_prompt(row: Row) -> str:
    """Returns one utterance per line, then an empty line."""
    lines = [line.strip() for line in str(row["dialogue"]).replace("\r", "").split("\n")]
    return "\n".join(line for line in lines if line) + "\n\n"


def score_samsum(outputs: Sequence[str], records: Sequence[Record]) -> Report:
    """Returns the mean F of ROUGE-1, ROUGE-2 and ROUGE-L over the outputs, in [0, 1], with the best
    of several references.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(METRICS.values()), use_stemmer=True)
    found = [
        scorer.score_multi(record["references"], output)
        for output, record in zip(outputs, records, strict=True)
    ]
    return Report(
        {
            ours: sum(one[theirs].fmeasure for one in found) / len(found)
            for ours, theirs in METRICS.items()
        }
    )


def read_samsum_references(path: Path) -> list[Record]:
    """Reads the summaries: the column summary of a table, or one per line."""
    if not is_table(path):
        return references_only([line] for line in read_lines(path))
    rows = read_rows(path)
    columns(rows, str(path), "summary")
    return references_only([str(row["summary"])] for row in rows)


def read_samsum_outputs(path: Path) -> list[str]:
    """Reads one summary per line, or the column summary (or output) of a table."""
    if not is_table(path):
        return read_lines(path)
    rows = read_rows(path)
    column = "output" if "output" in rows[0] else "summary"
    columns(rows, str(path), column)
    return [str(row[column]) for row in rows]
