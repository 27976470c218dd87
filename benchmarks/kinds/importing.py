"""What importing costs, each time in a fresh interpreter.

Weft's bytecode is written first, as pip does when it installs a package: where an interpreter may
not write any (PYTHONDONTWRITEBYTECODE), every import of a checkout would compile all of its files.
"""

from __future__ import annotations

import compileall
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ..memory import ROOT
from ..setup import Setup
from ..timing import Rounds, Work, interleave

_CODE = """
import json, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import {module}
print(json.dumps({{"torch": middle - start, "beyond": time.perf_counter() - middle}}))
"""


def measure(setup: Setup, contenders: tuple[str, ...], rounds: Rounds) -> dict[str, Any]:
    """Contenders are modules. Metrics: torch, seconds of `import torch`; beyond, seconds of the
    module after it; process, seconds of the whole interpreter.
    """
    compileall.compile_dir(ROOT / "src" / "weft", quiet=1)
    return {"samples": interleave({module: _work(module) for module in contenders}, rounds)}


def _work(module: str) -> Work:
    def run() -> Mapping[str, float]:
        import time

        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _CODE.format(module=module)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return {**found, "process": time.perf_counter() - started}

    return run
