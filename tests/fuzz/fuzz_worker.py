"""Runs cases in a process of its own: `fuzz_worker.py TARGET FIRST LAST HOME`. One line of JSON per
case, before and after it, so that its parent knows which case hangs.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch
from fuzz_adapters import Finding
from fuzz_adapters import case as adapter_case
from fuzz_texts import data_case, yaml_case

import weft

TARGETS = {"adapters": adapter_case, "yaml": yaml_case, "data": data_case}
GROWTH = 2**20  # KiB of memory that one case may add


def main(target: str, first: int, last: int, home: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases, originals = home / "cases", home / "originals"
    originals.mkdir(exist_ok=True)
    for number in range(first, last):
        say({"start": number})
        folder = cases / "case"
        folder.mkdir(parents=True)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        outcome = outcome_of(target, number, folder, originals)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        outside = [p.name for p in cases.iterdir() if p != folder] + [
            p.name for p in home.iterdir() if p not in (cases, originals)
        ]
        if number > first and grown > GROWTH:
            outcome["finding"] = f"{grown // 1024} MiB of memory"
        if outside:
            outcome["finding"] = f"files outside: {outside}"
        shutil.rmtree(cases)
        say({"done": number, "seconds": time.perf_counter() - began, **outcome})


def outcome_of(target: str, number: int, folder: Path, originals: Path) -> dict[str, str]:
    try:
        rng = random.Random(f"{target}/{number}")
        return {"outcome": TARGETS[target](rng, folder, originals)}
    except Finding as finding:
        return {"finding": str(finding)}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        origin = f"{Path(where.filename).name}:{where.lineno}"
        kind = "unexpected " if not isinstance(error, weft.WeftError) else ""
        return {"finding": f"{kind}{type(error).__name__} at {origin}: {str(error)[:300]}"}


def say(row: dict[str, object]) -> None:
    os.write(1, (json.dumps(row) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
