"""What is the latency of whole candidates on a GPU, as predicted without it and as measured on it?

    python experiments/gpu_latency/run.py --target h200 --candidates 24    # measures where an H200 is
    python experiments/gpu_latency/run.py --target h200                    # predicts what was measured, anywhere

Predictions are made with the calibration of the target, if one is in the cache folder. README.md says what the figures
are and how they came out.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from scipy.stats import kendalltau

from cosearch.__main__ import compose
from cosearch.core.candidate import Candidate
from cosearch.core.errors import Rejected, UserError
from cosearch.core.metric import Metrics
from cosearch.core.problem import Problem
from cosearch.measure.process import Worker
from cosearch.paths import cache_dir
from cosearch.proposers import PROPOSERS, Setting
from cosearch.settings import Settings
from cosearch.stages import Compile, Measure, Predict, Static
from cosearch.targets import TARGETS
from cosearch.targets.accelerator import ENVIRONMENT
from cosearch.targets.workplace import Workplace

RESULTS = Path(__file__).parent / "results.jsonl"
SCALES = {
    "small": (),
    "served": (
        "workload=decode_batch8",
        "knobs.architecture.width=[2048]",
        "knobs.architecture.depth=[8]",
        "knobs.architecture.head_dim=[128]",
        "knobs.precision.weights=[bfloat16]",
        "knobs.precision.activations=[bfloat16]",
        "knobs.precision.kv_cache=[bfloat16]",
        "knobs.sparsity.pattern=[dense]",
    ),
}
"""The default space, whose models are of a size that a laptop trains, and models as they are served."""


def rows(target: str, scale: str) -> list[dict[str, Any]]:
    """What was measured so far; a candidate may be there twice."""
    found = map(json.loads, RESULTS.read_text().splitlines()) if RESULTS.is_file() else ()
    return [row for row in found if (row["target"], row["scale"]) == (target, scale)]


def settings(scale: str, target: str) -> Settings:
    """The default search for this target, at this scale."""
    return Settings.from_config(compose(["experiment=llm_decode", f"target={target}", *SCALES[scale]]))


def problem_on(chosen: Settings, attached: bool) -> Problem:
    """Its problem, with the chip or without."""
    target = replace(TARGETS[chosen.target].target(cache_dir(), dict), attached=attached)
    return Problem(target, chosen.workload, chosen.objectives, chosen.constraints)


def score(candidate: Candidate, problem: Problem, stages: Sequence[Callable[..., Metrics]]) -> dict[str, Any]:
    """What the last of `stages` says of its latency; an "error" where one refuses it."""
    metrics: Metrics = {}
    try:
        for stage in stages:
            metrics = stage(candidate, problem)
    except Rejected as rejection:
        return {"error": str(rejection)}
    latency = metrics["latency_s"]
    return {"latency_s": latency.value, "interval": latency.interval, "model": latency.model}


def measure(scale: str, place: Workplace, candidates: int) -> None:
    """Measure so many random candidates, and append them to `RESULTS`."""
    chosen = settings(scale, place.name)
    problem, limits = problem_on(chosen, attached=True), chosen.limits
    with place.worker() as worker:
        timed = Measure(worker, limits.measure_s, chosen.measure_seconds)
        stages = (Static(), Compile(worker, limits.compile_s), timed)
        proposer = PROPOSERS["random"](Setting(chosen.load_space(), problem, 0, {}))
        for one in track(proposer.ask(candidates), f"measuring {scale}"):
            found = {"target": place.name, "scale": scale, "point": one.point, **score(one, problem, stages)}
            with RESULTS.open("a") as file:
                file.write(json.dumps(found) + "\n")


def predict(scale: str, target: str, candidates: Sequence[Candidate], workers: int) -> list[dict[str, Any]]:
    """What is said of each where no such GPU is."""
    chosen = settings(scale, target)
    problem, limits = problem_on(chosen, attached=False), chosen.limits

    def some(share: Sequence[Candidate]) -> list[dict[str, Any]]:
        with Worker(ENVIRONMENT) as worker:
            stages = (Static(), Compile(worker, limits.compile_s), Predict(worker, limits.measure_s))
            return [score(one, problem, stages) for one in share]

    found: list[dict[str, Any]] = [{}] * len(candidates)
    with ThreadPoolExecutor(workers) as threads:
        for first, share in enumerate(threads.map(some, [candidates[part::workers] for part in range(workers)])):
            found[first::workers] = share
    return found


def compare(scale: str, target: str, workers: int) -> dict[str, Any]:
    """How far predictions are from what was measured, and second measurements from the first."""
    measured: dict[Candidate, list[float]] = defaultdict(list)
    for row in rows(target, scale):
        if "error" not in row:
            measured[Candidate.from_point(row["point"])].append(row["latency_s"])
    said = predict(scale, target, list(measured), workers)
    both = [(one, was) for one, was in zip(said, measured.values(), strict=True) if "error" not in one]
    latency = np.array([one["latency_s"] for one, _ in both])
    was = np.array([np.median(each) for _, each in both])
    low, high = np.array([one["interval"] for one, _ in both]).T
    ratio = latency / was
    twice = [each for each in measured.values() if len(each) > 1]
    return {
        "target": target,
        "scale": scale,
        "model": both[0][0]["model"],
        "candidates": len(both),
        "refused_without": [one["error"] for one in said if "error" in one],
        "median_ratio": float(np.median(ratio)),
        "mape": float(np.abs(ratio - 1).mean()),
        "tau": float(kendalltau(latency, was).statistic),
        "coverage": float(((low <= was) & (was <= high)).mean()),
        "factor": float(np.median(np.sqrt(high / low))),
        "twice": float(np.mean([abs(second / first - 1) for first, second, *_ in twice])) if twice else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h200", help="a GPU of cosearch/targets")
    parser.add_argument("--scale", choices=tuple(SCALES), nargs="+", default=list(SCALES))
    parser.add_argument("--candidates", type=int, default=0, help="how many to measure; it must be attached for that")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile at once, to predict")
    options = parser.parse_args()
    try:
        place = Workplace.of(options.target)
        if options.candidates and not place.attached:
            parser.error(f"target={options.target}: is not attached to this machine, so that nothing is measured on it")
        for scale in options.scale if options.candidates else ():
            measure(scale, place, options.candidates)
        known = [scale for scale in options.scale if rows(options.target, scale)]
        print(json.dumps({"results": [compare(scale, options.target, options.workers) for scale in known]}))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
