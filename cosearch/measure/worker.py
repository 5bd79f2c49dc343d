"""The worker process itself: reads requests from its standard input, runs tasks, writes replies.

It ends when its parent does: the kernel sees to it, whatever state the worker is in, and where that is not Linux a
thread that watches the input does.
"""

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any

from cosearch.core.errors import NO_SPACE, Rejected, UserError

_PR_SET_PDEATHSIG = 1
"""Of `prctl` (2): the signal that a process gets when the thread that started it ends."""


def main() -> None:
    """Serve requests until the input ends."""
    _end_with_parent()
    # Replies go to a private copy of the standard output; whatever else prints lands in the log.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message, allow_nan=False) + "\n")
        replies.flush()

    from cosearch.measure.tasks import TASKS, Workbench

    bench = Workbench()
    while True:
        request = requests.get()
        nonce = request["id"]

        def progress(what: str, fraction: float, nonce: str = nonce) -> None:
            send({"id": nonce, "progress": what, "fraction": fraction})

        try:
            result = TASKS[request["task"]](bench, progress, **request["arguments"])
            send({"id": nonce, "result": result})
        except Rejected as error:
            send({"id": nonce, "rejected": str(error)})
        except UserError as error:
            send({"id": nonce, "user_error": str(error)})
        except Exception as error:  # the one place where whatever a candidate raises becomes data
            traceback.print_exc()
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                send({"id": nonce, "user_error": f"the disk is full: {error.filename or 'no space left'}"})
                continue
            send({"id": nonce, "rejected": f"{type(error).__name__}: {str(error)[:2000]}"})


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
