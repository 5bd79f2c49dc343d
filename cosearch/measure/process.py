"""A worker process as its parent sees it: requests and replies are JSON lines, and limits are the parent's.

Code that a candidate brings can hang, crash or take all memory; in a process group of its own the parent can
always end it. A worker that overruns its limit is killed with its whole group, and the next call starts
another. Replies are data, never pickles.
"""

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from cosearch.core.errors import Rejected, UserError

_MAX_REPLY_BYTES = 64 * 1024 * 1024
_LOG_LINES = 60
_GRACE_S = 5.0

Progress = Callable[[str, float], None]
"""Told what is going on and which fraction of it is done."""


class WorkerFailed(Rejected):
    """The worker crashed, overran its time or answered nonsense; it is gone."""


class Worker:
    """One worker process, started when first called and after each failure anew."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._buffer = b""

    def call(
        self, task: str, arguments: Mapping[str, Any], timeout_s: float, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Run a task of `cosearch.measure.tasks` and return its reply.

        Raises:
            WorkerFailed: it crashed, took longer than `timeout_s`, or answered nonsense.
            Rejected: the task refused; the reason is its own.
            UserError: the input or the machine is at fault, not the candidate.
        """
        process = self._started()
        nonce = secrets.token_hex(8)
        request = json.dumps({"id": nonce, "task": task, "arguments": arguments}, allow_nan=False) + "\n"
        deadline = time.monotonic() + timeout_s
        try:
            assert process.stdin is not None
            process.stdin.write(request.encode())
            process.stdin.flush()
            while True:
                reply = self._read_line(process, task, timeout_s, deadline)
                if reply.get("id") != nonce:
                    raise self._failed(task, "it answered a question that was not asked")
                if "progress" not in reply:
                    break
                if progress:
                    progress(str(reply["progress"]), float(reply["fraction"]))
        except (BrokenPipeError, ConnectionResetError):
            raise self._failed(task, self._ending(process)) from None
        except BaseException:
            self.stop()
            raise
        if "user_error" in reply:
            raise UserError(str(reply["user_error"]))
        if "rejected" in reply:
            raise Rejected(str(reply["rejected"]))
        return reply["result"]

    def stop(self) -> None:
        """Kill the worker and everything it started."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(_GRACE_S)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._buffer = b""

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        self._log.clear()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cosearch.measure.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        threading.Thread(target=self._keep_log, args=(self._process.stderr,), daemon=True).start()
        return self._process

    def _keep_log(self, stream: Any) -> None:
        # Reads bounded pieces, so that neither a flood of output nor one endless line can fill the memory.
        try:
            while piece := stream.readline(2000):
                self._log.append(piece.decode(errors="replace").rstrip())
        except ValueError:  # closed by `stop`
            return

    def _read_line(
        self, process: subprocess.Popen[bytes], task: str, timeout_s: float, deadline: float
    ) -> dict[str, Any]:
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise self._failed(task, f"it took longer than its limit of {timeout_s:.0f} s")
                piece = os.read(process.stdout.fileno(), 1 << 20)
                if not piece:
                    raise self._failed(task, self._ending(process))
                self._buffer += piece
                if len(self._buffer) > _MAX_REPLY_BYTES:
                    raise self._failed(task, f"its reply is longer than {_MAX_REPLY_BYTES} bytes")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            reply = json.loads(line, parse_constant=_refuse_constant)
        except ValueError:
            raise self._failed(task, "its reply is not JSON") from None
        if not isinstance(reply, dict):
            raise self._failed(task, "its reply is not a JSON object")
        return reply

    def _ending(self, process: subprocess.Popen[bytes]) -> str:
        try:
            code = process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            return "it closed its end without a reply"
        time.sleep(0.05)  # lets the log's thread read the last words
        how = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it exited with {code} without a reply"
        last = next((line for line in reversed(self._log) if line.strip()), "")
        return how + (f"; its last words: {last.strip()}" if last else "")

    def _failed(self, task: str, why: str) -> WorkerFailed:
        self.stop()
        return WorkerFailed(f"the worker failed in {task!r}: {why}")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} in a reply")
