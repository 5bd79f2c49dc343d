import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cosearch.core.errors import Rejected, UserError
from cosearch.measure import process as process_module
from cosearch.measure.process import Worker, WorkerFailed
from tests import tiny

# The worker is the real one. Python imports `sitecustomize` before it, which puts these tasks in the place of
# `cosearch.measure.tasks`, so that a worker also starts in no time.
TASKS = """
import ctypes, errno, json, os, resource, signal, subprocess, sys, time, types

from cosearch.core.errors import Rejected, UserError


def worker(name):
    frame = sys._getframe()
    while frame.f_code.co_name != "main" or name not in frame.f_locals:
        frame = frame.f_back
    return frame.f_locals[name]


def reply(text):
    os.write(worker("replies").fileno(), text.encode())


def hang(bench, progress):
    progress("hanging", 0.0)
    time.sleep(3600)

def busy(bench, progress):
    while True:
        pass

def stopped(bench, progress):
    progress("stopping", 0.0)
    os.kill(os.getpid(), signal.SIGSTOP)

def hang_in_native_code(bench, progress):
    progress("hanging", 0.0)
    ctypes.PyDLL(None).sleep(3600)  # keeps the interpreter's lock

def hang_deaf(bench, progress):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(3600)

def hang_with_children(bench, progress):
    children = [subprocess.Popen(["sleep", "3600"]) for _ in range(3)]
    progress(" ".join(str(child.pid) for child in children), 0.0)
    time.sleep(3600)

def crash_with_children(bench, progress):
    progress(str(subprocess.Popen(["sleep", "3600"]).pid), 0.0)
    os.abort()

def leave_a_daemon(bench, progress):
    progress(str(subprocess.Popen(["sleep", "30"], start_new_session=True).pid), 0.0)
    time.sleep(3600)

def segfault(bench, progress):
    ctypes.string_at(0)

def abort(bench, progress):
    os.abort()

def exit_0(bench, progress):
    os._exit(0)

def exit_system(bench, progress):
    sys.exit(7)

def last_words(bench, progress):
    print("LLVM ERROR: out of registers")
    sys.stdout.flush()
    os._exit(3)

def garbage(bench, progress):
    reply("this is \\xff\\x00 no JSON\\n")

def garbage_and_exit(bench, progress):
    reply("{{{{ garbage")
    os._exit(0)

def nan(bench, progress):
    reply('{"id": "%s", "result": {"latency_s": NaN}}\\n' % worker("nonce"))

def infinity(bench, progress):
    reply('{"id": "%s", "result": {"latency_s": 1e999}}\\n' % worker("nonce"))

def nested(bench, progress):
    reply('{"id": "%s", "result": %s}\\n' % (worker("nonce"), "[" * 100_000 + "]" * 100_000))

def no_object(bench, progress):
    reply("[1, 2]\\n")

def no_result(bench, progress):
    reply('{"id": "%s"}\\n' % worker("nonce"))

def no_mapping(bench, progress):
    reply('{"id": "%s", "result": 3}\\n' % worker("nonce"))

def wrong_progress(bench, progress):
    reply('{"id": "%s", "progress": "half", "fraction": "much"}\\n' % worker("nonce"))

def no_fraction(bench, progress):
    reply('{"id": "%s", "progress": "half"}\\n' % worker("nonce"))

def truncated(bench, progress):
    reply('{"id": "%s", "result": {"latency_s"' % worker("nonce"))
    os._exit(0)

def wrong_nonce(bench, progress):
    reply('{"id": "0123456789abcdef", "result": {"latency_s": 1e-9}}\\n')

def no_nonce(bench, progress):
    reply('{"result": {"latency_s": 1e-9}}\\n')

def oversized(bench, progress):
    return {"text": "x" * 3_000_000}

def endless(bench, progress):
    while True:
        reply("x" * 100_000)

def flood(bench, progress, lines):
    text = "y" * (79 if lines else 1_000_000) + ("\\n" if lines else "")
    for _ in range(50_000_000 // (2 * len(text))):
        os.write(1, text.encode())
        os.write(2, text.encode())
    return {"done": 1}

def flood_and_exit(bench, progress):
    os.write(2, b"z" * 50_000_000)
    os._exit(1)

def value_error(bench, progress):
    raise ValueError("a shape of [3, 4] where [4, 3] is needed")

def long_error(bench, progress):
    raise ValueError("long " * 100_000)

def memory(bench, progress):
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, most))
    try:
        return {"text": "x" * (1 << 34)}
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

def refuse(bench, progress):
    raise Rejected("does not compile: too many heads")

def blame_the_user(bench, progress):
    raise UserError("corpus=nowhere: there is no such file")

def disk_full(bench, progress):
    raise OSError(errno.ENOSPC, "No space left on device", "/data/weights")

def no_json(bench, progress):
    return {"value": object()}

def own_nan(bench, progress):
    return {"value": float("nan")}

def steps(bench, progress):
    for step in range(3):
        progress(f"step {step}", step / 3)
    return {"pid": os.getpid()}

def echo(bench, progress, **arguments):
    return arguments

def environment(bench, progress, name):
    return {"value": os.environ.get(name)}


tasks = types.ModuleType("cosearch.measure.tasks")
tasks.TASKS = {name: task for name, task in globals().items() if isinstance(task, types.FunctionType)}
tasks.Workbench = object
sys.modules["cosearch.measure.tasks"] = tasks
"""


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "sitecustomize.py").write_text(TASKS)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{tiny.ROOT}"}


@pytest.fixture
def worker(environment: dict[str, str]) -> Iterator[Worker]:
    with Worker(environment) as worker:
        yield worker


def test_arguments_and_results_arrive_as_they_are(worker: Worker):
    data = {"text": "é\n\x00\u2028", "numbers": [1, 2.5, -1e-300], "nested": {"a": None, "b": [True]}}
    assert worker.call("echo", data, 20) == data
    assert worker.call("echo", {"large": "x" * 5_000_000}, 20) == {"large": "x" * 5_000_000}


def test_one_worker_serves_many_calls_and_tells_its_progress(worker: Worker):
    told: list[tuple[str, float]] = []
    first = worker.call("steps", {}, 20, lambda what, fraction: told.append((what, fraction)))
    assert told == [("step 0", 0.0), ("step 1", 1 / 3), ("step 2", 2 / 3)]
    assert worker.call("steps", {}, 20) == first


def test_its_environment_is_added_to(environment: dict[str, str]):
    with Worker({**environment, "COSEARCH_TEST": "1"}) as worker:
        assert worker.call("environment", {"name": "COSEARCH_TEST"}, 20) == {"value": "1"}
        assert worker.call("environment", {"name": "COSEARCH_CACHE"}, 20) == {"value": os.environ["COSEARCH_CACHE"]}


@pytest.mark.parametrize("task", ["hang", "busy", "stopped", "hang_in_native_code", "hang_deaf"])
def test_whatever_hangs_is_killed_at_its_limit(worker: Worker, task: str):
    pid = worker.call("steps", {}, 20)["pid"]
    start = time.monotonic()
    with pytest.raises(WorkerFailed, match=f"'{task}': it took longer than its limit of 1 s"):
        worker.call(task, {}, 1.0)
    assert time.monotonic() - start < 3.0
    assert not tiny.is_running(pid)
    assert worker.call("echo", {"a": 1}, 20) == {"a": 1}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("segfault", "it was ended by SIGSEGV"),
        ("abort", "it was ended by SIGABRT"),
        ("exit_0", "it exited with 0 without a reply"),
        ("exit_system", "it exited with 7 without a reply"),
        ("last_words", "it exited with 3 without a reply; its last words: LLVM ERROR: out of registers"),
        ("garbage", "its reply is not JSON"),
        ("garbage_and_exit", "it exited with 0 without a reply"),
        ("nan", "its reply is not JSON"),
        ("infinity", "its reply is not JSON"),
        ("nested", "its reply is not JSON"),
        ("no_object", "its reply is not a JSON object"),
        ("no_result", "its reply has no result"),
        ("no_mapping", "its reply has no result"),
        ("wrong_progress", "its progress is no fraction"),
        ("no_fraction", "its progress is no fraction"),
        ("truncated", "it exited with 0 without a reply"),
        ("wrong_nonce", "it answered a question that was not asked"),
        ("no_nonce", "it answered a question that was not asked"),
    ],
)
def test_whatever_crashes_or_lies_is_one_failed_call(worker: Worker, task: str, message: str):
    with pytest.raises(WorkerFailed) as failed:
        worker.call(task, {}, 20)
    assert str(failed.value).startswith(f"the worker failed in {task!r}: {message}")
    assert worker.call("echo", {"a": 1}, 20) == {"a": 1}


@pytest.mark.parametrize("task", ["oversized", "endless"])
def test_a_reply_over_the_limit_is_refused(worker: Worker, monkeypatch: pytest.MonkeyPatch, task: str):
    monkeypatch.setattr(process_module, "_MAX_REPLY_BYTES", 2_000_000)
    with pytest.raises(WorkerFailed, match="its reply is longer than 2000000 bytes"):
        worker.call(task, {}, 20)
    assert worker.call("echo", {"a": 1}, 20) == {"a": 1}


@pytest.mark.parametrize("lines", [True, False])
def test_a_flood_of_output_is_read_and_forgotten(worker: Worker, lines: bool):
    assert worker.call("flood", {"lines": lines}, 60) == {"done": 1}
    assert worker.call("echo", {"a": 1}, 20) == {"a": 1}


def test_of_a_flood_little_gets_into_the_message(worker: Worker):
    with pytest.raises(WorkerFailed) as failed:
        worker.call("flood_and_exit", {}, 60)
    assert "zzzz" in str(failed.value)
    assert len(str(failed.value)) < 3000


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("value_error", "ValueError: a shape of [3, 4] where [4, 3] is needed"),
        ("refuse", "does not compile: too many heads"),
        ("memory", "MemoryError: "),
        ("no_json", "TypeError: Object of type object is not JSON serializable"),
        ("own_nan", "ValueError: Out of range float values are not JSON compliant"),
    ],
)
def test_what_a_task_raises_is_a_refusal_of_the_candidate(worker: Worker, task: str, message: str):
    pid = worker.call("steps", {}, 20)["pid"]
    with pytest.raises(Rejected) as refusal:
        worker.call(task, {}, 20)
    assert not isinstance(refusal.value, WorkerFailed)
    assert str(refusal.value).startswith(message)
    assert worker.call("steps", {}, 20)["pid"] == pid


def test_a_long_message_is_cut(worker: Worker):
    with pytest.raises(Rejected, match="ValueError: long long") as refusal:
        worker.call("long_error", {}, 20)
    assert len(str(refusal.value)) < 2100


@pytest.mark.parametrize(
    ("task", "message"),
    [("blame_the_user", "corpus=nowhere: there is no such file"), ("disk_full", "the disk is full: /data/weights")],
)
def test_what_is_not_the_candidates_fault_stays_the_users(worker: Worker, task: str, message: str):
    with pytest.raises(UserError) as error:
        worker.call(task, {}, 20)
    assert str(error.value) == message
    assert worker.call("echo", {"a": 1}, 20) == {"a": 1}


@pytest.mark.parametrize(("task", "limit_s"), [("hang_with_children", 1.0), ("crash_with_children", 20.0)])
def test_what_a_worker_started_ends_with_it(worker: Worker, task: str, limit_s: float):
    told: list[str] = []
    with pytest.raises(WorkerFailed):
        worker.call(task, {}, limit_s, lambda what, fraction: told.append(what))
    children = [int(pid) for pid in told[0].split()]
    tiny.wait_until(lambda: not any(map(tiny.is_running, children)), 2.0, "all its children are gone")


def test_a_daemon_that_keeps_the_log_open_does_not_keep_the_parent(worker: Worker):
    told: list[str] = []
    start = time.monotonic()
    with pytest.raises(WorkerFailed, match="longer than its limit"):
        worker.call("leave_a_daemon", {}, 1.0, lambda what, fraction: told.append(what))
    assert time.monotonic() - start < 3.0
    assert worker.call("echo", {"a": 1}, 20) == {"a": 1}
    os.kill(int(told[0]), signal.SIGKILL)


def test_an_interrupt_leaves_no_worker(worker: Worker):
    pid = worker.call("steps", {}, 20)["pid"]

    def interrupt(what: str, fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.call("hang", {}, 20, interrupt)
    assert not tiny.is_running(pid)


def test_a_worker_that_died_between_calls_is_replaced(worker: Worker):
    pid = worker.call("steps", {}, 20)["pid"]
    os.kill(pid, signal.SIGKILL)
    # Dead is when its threads are, too, and it can be waited for; that it is a zombie comes a little earlier.
    tiny.wait_until(
        lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None, 5.0, "it is dead"
    )
    assert worker.call("steps", {}, 20)["pid"] != pid


PARENT = """
import os, sys
from cosearch.measure.process import Worker
worker = Worker()
pid = worker.call("steps", {}, 30)["pid"]
worker.call(sys.argv[1], {}, 600, lambda *_: print(pid, flush=True))
"""


def test_programs_run_in_the_calling_thread_unless_the_user_says_otherwise(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    name = "JAX_CPU_ENABLE_ASYNC_DISPATCH"
    monkeypatch.delenv(name, raising=False)
    with Worker(environment) as worker:
        assert worker.call("environment", {"name": name}, 20) == {"value": "false"}
    monkeypatch.setenv(name, "true")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    with Worker(environment) as worker:
        assert worker.call("environment", {"name": name}, 20) == {"value": "true"}
        pages = worker.call("environment", {"name": "GLIBC_TUNABLES"}, 20)["value"]
        assert pages == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"


@pytest.mark.parametrize("task", ["hang", "hang_in_native_code", "stopped"])
def test_a_worker_ends_when_its_parent_is_killed(environment: dict[str, str], task: str):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, task],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert tiny.is_running(pid)
    finally:
        parent.kill()
        parent.communicate()
    tiny.wait_until(lambda: not tiny.is_running(pid), 5.0, "the worker is gone")


def test_the_real_tasks_are_served_too():
    with Worker() as worker:
        call: Callable[..., Any] = worker.call
        assert call("options", {"option_sets": [[], ["xla_no_such_option=true"]]}, 60)["refused"].keys() == {"1"}
        with pytest.raises(Rejected, match="is not compiled in this worker"):
            call("verify", {"point": {"architecture.width": 32}}, 60)
        with pytest.raises(Rejected, match="KeyError: 'no such task'"):
            call("no such task", {}, 60)
        assert json.dumps(call("options", {"option_sets": []}, 60)) == '{"refused": {}}'
