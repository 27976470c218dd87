"""A process of its own whose peak of resident memory is that of one contender's training steps
(memory.of_process).
"""

from __future__ import annotations

import json
import resource
import sys

import torch

from .factory import make
from .setup import Setup, batch, build


def resident() -> int:
    """Most bytes resident so far; Linux counts in KiB, macOS in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def main(text: str) -> None:
    asked = json.loads(text)
    torch.set_num_threads(asked["threads"])
    setup = Setup(**asked["setup"])
    contender = make(asked["contender"], build(setup), setup)
    data = batch(setup)
    before = resident()
    for _ in range(2):
        contender.loss(data).backward()  # type: ignore[no-untyped-call]
        if contender.optimiser is not None:
            contender.optimiser.step()
            contender.optimiser.zero_grad(set_to_none=True)
    print(json.dumps({"before_steps": before, "process_peak": resident()}))


if __name__ == "__main__":
    main(sys.argv[1])
