"""Times taken in turns, and what they say: medians, quartiles, and the ratio of medians with the
spread of its rounds.

A busy or throttling machine slows a whole round, and so all contenders alike: the quartiles of the
ratio within a round tell how far the ratio of medians can be trusted.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Work = Callable[[], Mapping[str, float]]  # does the work once and returns seconds by metric
Samples = dict[str, dict[str, list[float]]]  # contender -> metric -> one value a round


@dataclass(frozen=True)
class Rounds:
    """How long to go on: at least `least` rounds, then until `until` (of time.perf_counter) or
    until there are `most`.
    """

    until: float
    least: int = 5
    most: int = 51
    warm: int = 1

    def __post_init__(self) -> None:
        if self.least < 1 or self.most < self.least or self.warm < 0:
            raise ValueError(
                f"{self}: least must be 1 or more, most at least that, warm 0 or more."
            )

    @classmethod
    def within(cls, seconds: float, least: int = 5, most: int = 51, warm: int = 1) -> Rounds:
        """`seconds` from now, which building and checking the contenders uses up too."""
        return cls(time.perf_counter() + seconds, least, most, warm)


def interleave(works: Mapping[str, Work], rounds: Rounds) -> Samples:
    """Run all works once a round, in their order, A B C A B C ...; the first `warm` rounds are
    thrown away.

    Garbage is collected between the works and not within them.
    """
    found: Samples = {name: {} for name in works}
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is there now need not be looked through between the works
    done = -rounds.warm
    try:
        while done < rounds.least or (done < rounds.most and time.perf_counter() < rounds.until):
            for name, work in works.items():
                gc.collect()
                gc.disable()
                values = work()
                gc.enable()
                for metric, value in values.items() if done >= 0 else ():
                    found[name].setdefault(metric, []).append(value)
            done += 1
    finally:
        gc.unfreeze()
        (gc.enable if was_on else gc.disable)()
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within, torch uses so many threads; 0 leaves their number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def now(device: str = "cpu") -> float:
    """Seconds of a steady clock, once all work that was given to `device` is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def clocked(work: Callable[[], object], metric: str = "seconds") -> Work:
    """A work of one metric from a plain function."""

    def run() -> Mapping[str, float]:
        started = time.perf_counter()
        work()
        return {metric: time.perf_counter() - started}

    return run


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower and upper quartile."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return [low, high]


def summary(values: Sequence[float]) -> dict[str, object]:
    """What the results file holds of one metric of one contender."""
    return {"median": median(values), "quartiles": quartiles(values), "samples": list(values)}


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, list[float]]:
    """Ratio of the medians, and the quartiles of the ratios within each round. Raises ValueError:
    not the same rounds.
    """
    if len(over) != len(under):
        raise ValueError(f"{len(over)} and {len(under)} values were not taken in the same rounds.")
    return _divided(median(over), median(under)), quartiles(
        [_divided(a, b) for a, b in zip(over, under, strict=True)]
    )


def _divided(a: float, b: float) -> float:
    """a / b; an extra time that noise has made 0 gives nan, which is no target's "ok"."""
    return a / b if b else float("nan")
