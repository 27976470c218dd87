"""Who has a run, and whether that process of this machine is still there."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

# seconds by which two readings of one process's start may differ, since the clock may have been set
CLOCK = 60.0


@cache
def machine() -> str:
    """The same for processes that see each other's numbers: one host, and on Linux one boot and one
    container.
    """
    parts = [platform.node()]
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.is_file() and namespace.is_symlink():
        parts += [boot.read_text(encoding="ascii").strip(), str(namespace.readlink())]
    return " ".join(parts)


def me() -> dict[str, Any]:
    """What a claim says about the process that makes it."""
    import psutil

    return {
        "machine": machine(),
        "host": platform.node(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def is_gone(by: Mapping[str, Any]) -> bool:
    """True where it certainly is: on this machine, and no process has its number, or one that began
    at another time.
    """
    import psutil

    if by.get("machine") != machine():
        return False
    try:
        process = psutil.Process(by["pid"])
        return bool(
            process.status() == psutil.STATUS_ZOMBIE
            or abs(process.create_time() - by["started"]) > CLOCK
        )
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:  # somebody else's: the heartbeat tells
        return False


def told(by: Mapping[str, Any]) -> str:
    return f"process {by.get('pid', '?')} on {by.get('host', '?')}"
