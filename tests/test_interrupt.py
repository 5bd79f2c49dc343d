"""Interrupts, each of a process that interrupts itself where Python or a library ignores exceptions."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

START = """
import atexit, gc, os, signal, sys, time
from cosearch import interrupt as tested

tested.Interrupts(130, "the last words")

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

def wait():
    while True:
        time.sleep(0.01)

class Interrupting:
    def __del__(self):
        interrupt()

class Waiting:
    def __del__(self):
        wait()
"""

UNWINDS = """
try:
    lose()
    wait()
except KeyboardInterrupt:
    print("unwound", flush=True)
    sys.exit(130)
"""

DESTRUCTOR = """
def lose():
    Interrupting()
"""

GARBAGE_COLLECTION = """
left = [interrupt]

def callback(phase, info):
    if left:
        left.pop()()

gc.callbacks.append(callback)
lose = gc.collect
"""

THREE_DESTRUCTORS = """
def lose():
    Interrupting()
    Waiting()
    Waiting()
"""

SWALLOWED = """
tested._UNWIND_S = 0.1
try:
    interrupt()
except BaseException:
    wait()
"""

IGNORED_ALWAYS = """
tested._UNWIND_S = 0.1
Interrupting()
while True:
    Waiting()
"""

TWICE = """
signal.setitimer = lambda timer, seconds: (0.0, 0.0)
try:
    interrupt()
except BaseException:
    interrupt()
    wait()
"""

WAITS_AT_THE_EXIT = """
tested._EXIT_S = 0.1
atexit.register(wait)
lose = interrupt
"""


def run(code: str, *prefix: str) -> tuple[int, str, str]:
    # A job in a shell's background ignores interrupts, and what it starts would, too.
    command = [*(prefix or ("env", "--default-signal=INT")), sys.executable, "-c", START + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("losing", [DESTRUCTOR, GARBAGE_COLLECTION, THREE_DESTRUCTORS])
def test_an_interrupt_that_python_ignores_is_raised_again(losing: str):
    assert run(losing + UNWINDS) == (130, "unwound\n", "")


@pytest.mark.parametrize("code", [SWALLOWED, IGNORED_ALWAYS, TWICE])
def test_what_does_not_unwind_ends_on_the_spot(code: str):
    assert run(code) == (130, "", "the last words\n")


def test_what_is_called_at_the_exit_has_its_limit():
    assert run(WAITS_AT_THE_EXIT + UNWINDS) == (130, "unwound\n", "the last words\n")


def test_a_process_that_was_started_to_ignore_interrupts_does():
    assert run("interrupt()\nprint('goes on')", "env", "--ignore-signal=INT") == (0, "goes on\n", "")


def test_other_exceptions_that_python_ignores_are_told():
    code, out, err = run("class Wrong:\n    def __del__(self):\n        1 / 0\n\nWrong()")
    assert (code, out) == (0, "")
    assert "ZeroDivisionError" in err
