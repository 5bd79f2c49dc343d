"""A worker process as its parent sees it: requests and replies are JSON lines, and limits are the parent's.

Code that a candidate brings can hang, crash or take all memory; in a process group of its own the parent can
always end it. A worker that overruns its limit is killed with its whole group, and the next call starts
another. Replies are data, never pickles.
"""

import json
import math
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
from typing import Any, BinaryIO, cast

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
        self._environment = {**os.environ, **_quick(os.environ), **(environment or {})}
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
                if not isinstance(reply.get("fraction"), int | float):
                    raise self._failed(task, "its progress is no fraction")
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
        if not isinstance(reply.get("result"), dict):
            raise self._failed(task, "its reply has no result")
        return reply["result"]

    def stop(self) -> None:
        """Kill the worker and everything it started."""
        process, self._process = self._process, None
        if process is None:
            return
        # Also where it has ended by itself: what it started may live on. Its number is its own until it is waited for.
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(_GRACE_S)
        # The log's thread closes the error stream: closing here would wait for whoever else still has it open.
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._buffer = b""

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and not _has_ended(self._process):
            return self._process
        self.stop()
        self._log = deque(maxlen=_LOG_LINES)  # its own: the last one's may still be written to
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cosearch.measure.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        threading.Thread(target=_keep_log, args=(cast(BinaryIO, self._process.stderr), self._log), daemon=True).start()
        return self._process

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
            reply = json.loads(line, parse_constant=_refuse_constant, parse_float=_finite)
        except (ValueError, RecursionError):
            raise self._failed(task, "its reply is not JSON") from None
        if not isinstance(reply, dict):
            raise self._failed(task, "its reply is not a JSON object")
        return reply

    def _ending(self, process: subprocess.Popen[bytes]) -> str:
        until = time.monotonic() + _GRACE_S
        while not _has_ended(process):
            if time.monotonic() > until:
                return "it closed its end without a reply"
            time.sleep(0.01)
        self.stop()
        code = process.returncode
        time.sleep(0.05)  # lets the log's thread read the last words
        how = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it exited with {code} without a reply"
        last = next((line for line in reversed(self._log) if line.strip()), "")
        return how + (f"; its last words: {last.strip()}" if last else "")

    def _failed(self, task: str, why: str) -> WorkerFailed:
        self.stop()
        return WorkerFailed(f"the worker failed in {task!r}: {why}")


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has, without collecting it: until then its number, which is its group's, is nobody else's."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _keep_log(stream: BinaryIO, log: deque[str]) -> None:
    # Reads bounded pieces, so that neither a flood of output nor one endless line can fill the memory.
    with stream:
        while piece := stream.readline(2000):
            log.append(piece.decode(errors="replace").rstrip())


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} in a reply")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} in a reply")


def _quick(environment: Mapping[str, str]) -> dict[str, str]:
    """What has programs run as fast as they can, beside what the user says.

    glibc asks Linux for large pages: reading memory through small ones took a third longer on one processor. And JAX
    runs programs in the thread that calls them: handing them to another took 100 us a call, and that thread and those
    that help it were often woken up on one core.
    """
    told = environment.get("GLIBC_TUNABLES", "")
    return {
        "GLIBC_TUNABLES": ":".join(filter(None, [told, "glibc.malloc.hugetlb=1"])),
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": environment.get("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false"),
    }
