"""A worker process of `weft compare`: opens a bench and does what it is told, one JSON line for
another.

A process of our own rather than multiprocessing: nothing is pickled, nothing depends on how the
caller's main module was started, Ctrl-C in the terminal does not reach it, and it ends by itself
when its caller is gone, even when killed.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

from ..errors import WeftError


def main() -> None:
    """Serve until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log and not between the replies
    orders: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(sys.stdin, orders), daemon=True).start()
    bench: Any = None
    while True:
        order = orders.get()
        try:
            if order["do"] == "open":
                from .bench import Opening, open_bench

                bench = open_bench(Opening(**order["opening"]))
                answer = bench.describe()
            else:
                answer = _work(bench, order)
            _reply(replies, {"answer": answer})
        except WeftError as error:
            _reply(replies, {"error": str(error), "expected": True})
        except (
            Exception
        ) as error:  # anything else is this run's failure, told with its trace in the log
            traceback.print_exc()
            _reply(
                replies,
                {
                    "error": f"{type(error).__name__}: {' '.join(str(error).split())}",
                    "expected": False,
                },
            )


def _listen(lines: TextIO, orders: queue.Queue[dict[str, Any]]) -> None:
    for line in lines:
        orders.put(json.loads(line))
    os._exit(0)  # the caller is gone: nobody would read the result of the run in progress


def _work(bench: Any, order: dict[str, Any]) -> dict[str, Any]:
    from .plan import RunSpec

    if order["do"] == "run":
        save_to = Path(order["save_to"]) if order["save_to"] else None
        return dict(bench.run(RunSpec(**order["spec"]), save_to))
    if order["do"] == "measure":
        return dict(bench.measure(order["config"], order["batch"]))
    if order["do"] == "ranks":
        return dict(bench.ranks(order["configs"], order["target"], order["most"]))
    raise WeftError(f"a worker does not know the order {order['do']!r}.")


def _reply(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
