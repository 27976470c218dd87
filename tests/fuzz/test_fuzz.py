"""Damaged and forged files of every kind: each is read right, or refused by an error of Weft, within
bounded time and memory. `make fuzz` runs thousands of cases; the first of them run always.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("fuzz_worker.py")
LIMIT = 10.0  # seconds of a case; the machine may be busy
CASES = {"adapters": 4000, "yaml": 3000, "data": 3000}


def campaign(target, first, last, home):
    """Runs the cases, in a new process after each hang. Returns outcomes and findings."""
    outcomes, findings = Counter(), []
    while first < last:
        first, more, found = one_process(target, first, last, home)
        outcomes += more
        findings += found
    return outcomes, findings


def one_process(target, first, last, home):
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(WORKER), target, str(first), str(last), str(home)]
    outcomes, findings, rows = Counter(), [], queue.Queue()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        reader = threading.Thread(target=lambda: [rows.put(line) for line in process.stdout])
        reader.start()
        current, limit = first, 120.0  # the imports
        while current < last:
            try:
                row = json.loads(rows.get(timeout=limit))
            except queue.Empty:
                process.kill()
                findings.append(f"{target} case {current}: more than {LIMIT:g} seconds")
                current += 1
                break
            limit = LIMIT
            if "start" in row:
                current = row["start"]
                continue
            if "finding" in row:
                findings.append(f"{target} case {row['done']}: {row['finding']}")
            outcomes[row.get("outcome", "finding")] += 1
            current = row["done"] + 1
        process.kill()
        reader.join()
    return current, outcomes, findings


def check(target, first, last, home):
    outcomes, findings = campaign(target, first, last, home)
    counts = ", ".join(f"{name} {n}" for name, n in sorted(outcomes.items()))
    print(f"\n{target}: {last - first} cases ({counts}), {len(findings)} findings")
    assert not findings, "\n".join(findings[:40])
    assert sum(outcomes.values()) == last - first
    assert any("refused" in name for name in outcomes) and any("read" in name for name in outcomes)


@pytest.mark.parametrize("target", CASES)
def test_the_first_cases(target, tmp_path):
    check(target, 0, 60, tmp_path / "home")


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.parametrize("target", CASES)
def test_all_cases(target, tmp_path):
    check(target, 0, int(os.environ.get("WEFT_FUZZ_CASES", CASES[target])), tmp_path / "home")
