"""How far a comparison is: a bar in a terminal, a line a run anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, TextIO


class Progress:
    """Counts finished work on `stream`. In a terminal a bar with the time left, in a log file plain
    lines.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Any = None
        self._done = self._started_at = 0
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, done: int, total: int) -> None:
        """`done` of `total` are there already, and say nothing about the time that the others
        take.
        """
        self._done = self._started_at = done
        self._started = time.monotonic()
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=done,
                file=self._stream,
                dynamic_ncols=True,
                smoothing=0.1,
                leave=False,
                bar_format="{n_fmt}/{total_fmt} |{bar:16}| {remaining} left  {desc}",
            )

    def step(self, done: int, total: int, what: str) -> None:
        """`what` has just finished; the total may have grown."""
        if self._bar is not None:
            self._bar.total = total
            self._bar.set_description_str(what, refresh=False)
            self._bar.update(done - self._done)
        else:
            self._say(f"{done:>3}/{total}  {what}{self._left(done, total)}")
        self._done = done

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._say(text)

    def _say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _left(self, done: int, total: int) -> str:
        new = done - self._started_at
        if new < 1 or done >= total:
            return ""
        seconds = (time.monotonic() - self._started) / new * (total - done)
        return f"  ({clock(seconds)} left)"


def clock(seconds: float) -> str:
    """1:05, or 1:02:03 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
