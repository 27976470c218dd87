"""Progress of a comparison: a bar in a terminal, one line per run elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, TextIO


class Progress:
    """Shows the number of finished runs, and the time left, on `stream`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Any = None
        self._done = self._done_before = 0
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
        """Starts the clock. The `done` runs do not count for the estimate of the time left."""
        self._done = self._done_before = done
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

    def step(self, done: int, total: int, text: str) -> None:
        """Shows that `done` of `total` runs are finished; `total` may grow from call to call."""
        if self._bar is not None:
            self._bar.total = total
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(done - self._done)
        else:
            self._write_line(f"{done:>3}/{total}  {text}{self._time_left(done, total)}")
        self._done = done

    def message(self, text: str) -> None:
        """Writes a line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._write_line(text)

    def _write_line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _time_left(self, done: int, total: int) -> str:
        new = done - self._done_before
        if new < 1 or done >= total:
            return ""
        seconds = (time.monotonic() - self._started) / new * (total - done)
        return f"  ({format_duration(seconds)} left)"


def format_duration(seconds: float) -> str:
    """1:05, or 1:02:03 from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
