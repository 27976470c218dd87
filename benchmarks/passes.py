"""Single operations of a layer, timed alone: what a method's share of a step can be at least.

`python -m benchmarks.passes [TOKENS OUT IN R]` prints a table: microseconds, and the share of the
layer's own two products (x Wᵀ forwards and g W backwards).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from .internals import dot
from .machine import machine

ROUNDS, SETS = 41, 6  # more sets of tensors than the caches hold, taken in turn


def passes(tokens: int, out: int, in_: int, r: int) -> dict[str, Callable[[int], object]]:
    """The operations by name; each takes the number of the set of tensors to run on."""

    def draw(rows: int, columns: int) -> list[torch.Tensor]:
        return [torch.randn(rows, columns) for _ in range(SETS)]

    x, g, y, W, room = (
        draw(tokens, in_),
        draw(tokens, out),
        draw(tokens, out),
        draw(out, in_),
        torch.empty(out, in_),
    )
    A, B, h, sigma = draw(r, in_), draw(out, r), draw(tokens, r), torch.rand(out) + 0.5
    return {
        "x W'": lambda i: x[i] @ W[i].t(),
        "g W": lambda i: g[i] @ W[i],
        "LoRA: x A'": lambda i: x[i] @ A[i].t(),
        "LoRA: y += h B'": lambda i: y[i].addmm_(h[i], B[i].t()),
        "LoRA: g B": lambda i: g[i] @ B[i],
        "LoRA: h' g": lambda i: h[i].t() @ g[i],
        "LoRA: (g B)' x": lambda i: h[i].t() @ x[i],
        "LoRA: grad x += (g B) A": lambda i: x[i].addmm_(h[i], A[i]),
        "DoRA: W A'": lambda i: W[i] @ A[i].t(),
        "DoRA: sigma y, in place": lambda i: y[i].mul_(sigma),
        "DoRA: sum of g y": lambda i: dot(g[i], y[i]),
        "DoRA: sigma W": lambda i: torch.mul(W[i], sigma[:, None], out=room),
        "W' = W + C A": lambda i: torch.addmm(W[i], B[i], A[i], out=room),
    }


def main(words: list[str]) -> None:
    """Print the table."""
    tokens, out, in_, r = map(int, words or ("1024", "768", "768", "16"))
    works = passes(tokens, out, in_, r)
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(ROUNDS + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work(turn % SETS)
            if turn:
                times[name].append(time.perf_counter() - started)
    whole = median(times["x W'"]) + median(times["g W"])
    print(
        f"{tokens} tokens, W [{out}, {in_}], r = {r}; {machine()['cpu']}, "
        f"{torch.get_num_threads()} threads"
    )
    for name, found in times.items():
        print(f"  {name:26}{1e6 * median(found):9.0f} us{100 * median(found) / whole:8.1f} %")


if __name__ == "__main__":
    main(sys.argv[1:])
