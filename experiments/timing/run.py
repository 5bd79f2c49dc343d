"""Does a comparison of two sides find what is there, and nothing where nothing is?

    python experiments/timing/run.py              # about 20 minutes; what is done is kept, so it can be stopped
    python experiments/timing/run.py --count 6    # a look at it

The sides are one executable twice, or one that is made 3 % slower; beside half of them a compiler runs.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from cosearch import axes
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.measure import timing
from cosearch.measure.bench import Bench, Compiled, device_canary, steps
from cosearch.measure.fingerprint import fingerprint
from cosearch.measure.process import Worker
from cosearch.paths import cache_dir
from cosearch.targets import TARGETS

RESULTS = Path(__file__).with_name("results.jsonl")
_PEAKS_S = 120.0
SPACE, CONTEXT, ROUNDS, GAIN = "llm_decode", 256, 600, 0.03
PLAN = (("same", False, 1.0), ("same", True, 1.0), ("slower", False, 0.4), ("slower", True, 0.4))
"""What is compared, whether beside a compiler, and how many times as often as `--count` says."""

COMPILER = """
import jax, jax.numpy as jnp
size = 64
while True:
    size = 64 + (size + 1) % 64
    step = jax.jit(lambda x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ c) + jnp.sin(c).sum(), None), x, None, 3)[0])
    step.lower(jnp.ones((size, size))).compile()
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = (
        [json.loads(line) for line in arguments.results.read_text().splitlines()] if arguments.results.exists() else []
    )
    with Worker() as worker:
        target = TARGETS["cpu"].target(cache_dir(), lambda: worker.call("peaks", {}, _PEAKS_S))
    (compiled,) = Bench().compile(
        axes.load_space(SPACE).reference, Workload("timing", (OperatingPoint("decode", 1, CONTEXT),))
    )
    canary = device_canary()
    for kind, loaded, part in PLAN:
        done = {row["index"] for row in rows if (row["kind"], row["loaded"]) == (kind, loaded)}
        left = sorted(set(range(round(part * arguments.count))) - done)
        with compiler(loaded and bool(left)):
            for index in track(left, f"{kind}, {'beside a compiler' if loaded else 'alone'}", transient=True):
                row = {"kind": kind, "loaded": loaded, "index": index}
                row |= compare(compiled, 2 * target.cache_bytes, GAIN if kind == "slower" else 0.0, canary, index)
                rows.append(row)
                with open(arguments.results, "a") as results:
                    results.write(json.dumps(row) + "\n")
    print(json.dumps(summary(rows)))


def compare(compiled: Compiled, cold_bytes: int, gain: float, canary: timing.Canary, seed: int) -> dict[str, Any]:
    """One comparison of a program with itself, or with itself and some waiting, each with copies of its own."""
    ours, others = steps([compiled, compiled], cold_bytes, seed)
    quiet_s = float(np.quantile(timing.sample(ours, 0.05, canary).sides[0], 0.25))
    start = time.perf_counter()
    timed = timing.side_by_side([ours, waiting(others, gain * quiet_s)], ROUNDS, seed, canary)
    own, other = timed.sides
    ratio, interval = timing.ratio_interval(own, other)
    return {
        "verdict": timing.compare(own, other),
        "ratio": ratio,
        "interval": interval,
        "median_s": [float(np.median(side)) for side in timed.sides],
        "rounds": len(timed.sides[0]),
        "contended": timed.contended,
        "seconds": time.perf_counter() - start,
        "canary_s": canary.quiet_s,
    }


def waiting(run: timing.Run, seconds: float) -> Callable[[], None]:
    """`run`, and a core kept busy for so long after it."""
    if not seconds:
        return run

    def longer() -> None:
        run()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass

    return longer


@contextmanager
def compiler(wanted: bool) -> Iterator[None]:
    """A process that compiles one program after the other."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", COMPILER])
    try:
        time.sleep(3)
        yield
    finally:
        process.kill()
        process.wait()


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How often each verdict came, and the bars that are set for it."""
    found: dict[str, Any] = {}
    for kind, loaded, _ in PLAN:
        of = [row for row in rows if (row["kind"], row["loaded"]) == (kind, loaded)]
        if of:
            found[f"{kind}, {'loaded' if loaded else 'quiet'}"] = {
                "comparisons": len(of),
                **{verdict.value: sum(row["verdict"] == verdict for row in of) for verdict in timing.Verdict},
                "ratio_deviation": float(np.std([row["ratio"] for row in of])),
                "contended": float(np.mean([row["contended"] for row in of])),
                "seconds": float(np.mean([row["seconds"] for row in of])),
            }
    same = [row for row in rows if row["kind"] == "same"]
    slower = [row for row in rows if row["kind"] == "slower" and not row["loaded"]]
    return {
        "false_wins": sum(row["verdict"] != timing.Verdict.UNDECIDED for row in same),
        "of": len(same),
        "gains_found": float(np.mean([row["verdict"] == timing.Verdict.FASTER for row in slower])) if slower else None,
        "by": found,
        "processor": fingerprint()["processor"],
        "cores": fingerprint()["cores"],
        "jaxlib": fingerprint()["jaxlib"],
    }


if __name__ == "__main__":
    main()
