"""One token at a time with a cache, in CPU time, and what DoRA's check of its kept norm costs of it.

`python -m benchmarks.decoding [ROUNDS]` prints a table: milliseconds per token, over the bare model,
and what a contender adds per adapted layer. "weft.DoRA, unchecked" takes the kept norm without a look
whether it is still true, which Weft never does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from weft.ops.cache import Cache

from .kinds.inference import PROMPT, cache_key, model_for, next_token
from .machine import machine
from .setup import STORIES, Setup, batch, build

TOKENS = 5  # per round and contender
UNCHECKED = ", unchecked"
CONTENDERS = ("base", "merged.LoRA:8", "weft.LoRA:8", "weft.DoRA:8", f"weft.DoRA:8{UNCHECKED}")


@contextmanager
def trusting() -> Iterator[None]:
    """Within this block kept values are taken without a check."""
    checked = Cache.fresh

    def fresh(self: Cache, name: str, sources: Any) -> Any:
        entry = self._entries.get(name)
        return None if entry is None else entry.value

    Cache.fresh = fresh  # type: ignore[method-assign]
    try:
        yield
    finally:
        Cache.fresh = checked  # type: ignore[method-assign]


def works(setup: Setup) -> tuple[dict[str, Callable[[], None]], int]:
    """The next token of every contender, by name, and the number of adapted layers."""
    base, ids = build(setup), batch(setup)["input_ids"][:1, :PROMPT]
    found, layers = {}, 0
    for name in CONTENDERS:
        model = model_for(name.removesuffix(UNCHECKED), base, setup)
        layers = max(layers, sum(hasattr(m, "weft") for m in model.modules()))
        found[name] = next_token(model, ids, cache_key(base))
    return found, layers


def _seconds(run: Callable[[], None]) -> float:
    started = time.process_time()
    for _ in range(TOKENS):
        run()
    return (time.process_time() - started) / TOKENS


def main(words: list[str]) -> None:
    """Print the table."""
    setup = Setup(model=STORIES, tokens=128, r=8, flow=False, threads=1)
    torch.set_num_threads(1)
    with torch.no_grad():
        runs, layers = works(setup)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(int(words[0] if words else 100) + 1):
            for name, run in runs.items():
                if name.endswith(UNCHECKED):
                    with trusting():
                        seconds = _seconds(run)
                else:
                    seconds = _seconds(run)
                if turn:
                    times[name].append(seconds)
    bare = median(times["base"])
    print(f"{STORIES}, one row, {layers} adapted layers; {machine()['cpu']}, 1 thread, CPU time")
    for name, found in times.items():
        own = median(found)
        extra = 1e6 * (own - bare) / layers
        print(f"  {name:24}{1e3 * own:8.2f} ms{own / bare:7.3f}{extra:8.1f} us a layer")


if __name__ == "__main__":
    main(sys.argv[1:])
