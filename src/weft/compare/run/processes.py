"""Which process claimed a run, and whether it still runs on this machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

# Two readings of a process's start time may differ by these seconds, because clocks can be set.
CLOCK_TOLERANCE = 60.0


@cache
def machine_id() -> str:
    """Identifies the processes that share process numbers: the host; on Linux the boot and the
    container too.
    """
    parts = [platform.node()]
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.is_file() and namespace.is_symlink():
        parts += [boot.read_text(encoding="ascii").strip(), str(namespace.readlink())]
    return " ".join(parts)


def this_process() -> dict[str, Any]:
    """Returns the entry that a claim stores about its process."""
    import psutil

    return {
        "machine": machine_id(),
        "host": platform.node(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def has_ended(owner: Mapping[str, Any]) -> bool:
    """Returns True if the process certainly ended.

    That is: it ran on this machine, and no process has its number, or one that started at another
    time.
    """
    import psutil

    if owner.get("machine") != machine_id():
        return False
    try:
        process = psutil.Process(owner["pid"])
        return bool(
            process.status() == psutil.STATUS_ZOMBIE
            or abs(process.create_time() - owner["started"]) > CLOCK_TOLERANCE
        )
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:  # another user's process: its heartbeat decides
        return False


def describe_process(owner: Mapping[str, Any]) -> str:
    """Returns the process number and the host, for messages."""
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
