"""The smallest search that has all its parts: a space, text to train on, and the overrides of a run; and packages of
others, as pip would leave them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SPACE = """
knobs:
  architecture.width: [32]
  architecture.depth: [1]
  architecture.head_dim: [16]
  architecture.attention: [mha, mqa]
  architecture.ffn_ratio: [2]
  precision.weights: [float32, int8]
  schedule.layers: [scan, unroll]
  schedule.matmul: [dot, multiply_reduce]
reference:
  architecture.width: 32
  architecture.depth: 1
  architecture.head_dim: 16
  architecture.ffn_ratio: 2
"""


def write_inputs(folder: Path) -> None:
    """`space.yaml` and the text folder `text`, of 24 files that differ."""
    (folder / "space.yaml").write_text(SPACE)
    (folder / "text").mkdir()
    for index in range(24):
        lines = (f"def function_{index}_{line}(value):\n    return value + {line * index}\n" for line in range(80))
        (folder / "text" / f"module_{index}.py").write_text("".join(lines))


def overrides(inputs: Path, output: Path, *more: str) -> list[str]:
    """What makes `experiment=llm_decode` tiny; later overrides win."""
    return [
        "experiment=llm_decode",
        "quality=minimal",
        "proposer=random",
        f"space={inputs / 'space.yaml'}",
        f"corpus={inputs / 'text'}",
        f"output={output}",
        "workload.points=[{phase:decode,batch:1,context:32}]",
        "constraints=[]",
        "trackers=[html]",
        "measure_seconds=0.01",
        "budget.trials=6",
        *more,
    ]


def start(arguments: Sequence[str], **more: str) -> subprocess.Popen[str]:
    """`python -m cosearch …` in a process group of its own; `more` is added to its environment."""
    return subprocess.Popen(
        # A job in a shell's background ignores interrupts, and what it starts would, too.
        ["env", "--default-signal=INT", sys.executable, "-m", "cosearch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **more},
        start_new_session=True,
    )


def command(*arguments: str, timeout_s: float = 240.0, **more: str) -> tuple[int, str, str]:
    """The exit code, output and errors of `python -m cosearch …`."""
    process = start(arguments, **more)
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        end(process)
    return process.returncode, out, err


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process that `start` gave, with its group."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def is_running(pid: int) -> bool:
    """Whether a process lives; one that nobody has collected yet does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(true: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something that takes a moment.

    Raises:
        AssertionError: it did not become true in time.
    """
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def install(folder: Path, modules: dict[str, str], entry_points: str) -> None:
    """What pip would leave of a package `acme_cosearch`."""
    package, metadata = folder / "acme_cosearch", folder / "acme_cosearch-1.0.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    for name, text in {"__init__": "", **modules}.items():
        (package / f"{name}.py").write_text(text)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-cosearch\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entry_points)


def python(site: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` where what is installed in `site` is found."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd=site, capture_output=True, text=True, check=False)
