"""A terminal that closes: its processes get SIGHUP, and from then on every write to it fails."""

from __future__ import annotations

import os
import signal

_STREAMS = (0, 1, 2)


def open_terminals() -> list[int]:
    """Returns which of the three standard streams are a terminal."""
    return [stream for stream in _STREAMS if os.isatty(stream)]


def leave(streams: list[int]) -> None:
    """Leads these streams nowhere, so that a closed terminal cannot stop what is still to be saved."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in streams:
        os.dup2(nowhere, stream)
    os.close(nowhere)


def signals() -> list[int]:
    """Returns the signals that ask a program to stop: Ctrl-C, SIGTERM, and SIGHUP unless it is
    ignored, as it is under nohup.
    """
    found: list[int] = [signal.SIGINT, signal.SIGTERM]
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
        found.append(hang_up)
    return found
