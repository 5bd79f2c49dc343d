"""What is the latency of whole candidates on a GPU, as predicted without it and as measured on it?

    python experiments/gpu_latency/run.py --target h200 --candidates 24       # where an H200 is
    python -m cosearch calibrate target=h200 && python experiments/gpu_latency/run.py --target h200 --candidates 24
    python experiments/gpu_latency/run.py --report                            # from results.jsonl, anywhere

README.md says what the figures are and how they came out.
"""

import argparse
import json
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
from cosearch.core.problem import Problem
from cosearch.core.target import Target
from cosearch.measure.process import Worker
from cosearch.paths import cache_dir
from cosearch.proposers import PROPOSERS, Setting
from cosearch.settings import Settings
from cosearch.stages import Compile, Measure, Predict, Static
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


def rows() -> list[dict[str, Any]]:
    """What was predicted and measured so far."""
    return list(map(json.loads, RESULTS.read_text().splitlines())) if RESULTS.is_file() else []


def settings(scale: str, target: str) -> Settings:
    """The default search for this target, at this scale."""
    return Settings.from_config(compose(["experiment=llm_decode", f"target={target}", *SCALES[scale]]))


def problem_on(chosen: Settings, target: Target) -> Problem:
    """Its problem."""
    return Problem(target, chosen.workload, chosen.objectives, chosen.constraints)


def score(candidate: Candidate, problem: Problem, stages: Sequence[Callable[..., Any]]) -> dict[str, Any]:
    """What the last of `stages` says of its latency; an "error" where one refuses it."""
    found: dict[str, Any] = {"uid": candidate.uid}
    try:
        for stage in stages:
            metrics = stage(candidate, problem)
    except Rejected as rejection:
        return found | {"error": str(rejection)}
    latency = metrics["latency_s"]
    return found | {"latency_s": latency.value, "interval": latency.interval, "model": latency.model}


def study(scale: str, target: str, candidates: int, workers: int) -> None:
    """Predict as where no such GPU is, and measure what was not measured before; append both to `RESULTS`.

    Raises:
        UserError: no such GPU is attached.
    """
    chosen, place = settings(scale, target), Workplace.of(target)
    if not place.attached:
        raise UserError(f"target={target}: is not attached to this machine, so that nothing can be measured on it")
    here = problem_on(chosen, place.target(cache_dir(), dict))
    elsewhere = problem_on(chosen, replace(here.target, attached=False))
    drawn = PROPOSERS["random"](Setting(chosen.load_space(), elsewhere, 0, {})).ask(candidates)
    limits = chosen.limits

    def predict(share: Sequence[Candidate]) -> list[dict[str, Any]]:
        with Worker(ENVIRONMENT) as worker:
            stages = (Static(), Compile(worker, limits.compile_s), Predict(worker, limits.measure_s))
            return [score(one, elsewhere, stages) for one in share]

    with ThreadPoolExecutor(workers) as threads:
        for found in threads.map(predict, [drawn[part::workers] for part in range(workers)]):
            for one in found:
                append({"scale": scale, "target": target, "what": "predicted", **one})
    done = {row["uid"] for row in rows() if row["what"] == "measured" and row["scale"] == scale}
    with place.worker() as worker:
        stages = (
            Static(),
            Compile(worker, limits.compile_s),
            Measure(worker, limits.measure_s, chosen.measure_seconds),
        )
        for one in track([one for one in drawn if one.uid not in done], "measuring"):
            found = {"scale": scale, "target": target, "what": "measured", "point": one.point}
            append(found | score(one, here, stages))


def append(row: dict[str, Any]) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def report() -> list[dict[str, Any]]:
    """How far each model's predictions are from what was measured, by scale."""
    measured = {(row["scale"], row["uid"]): row["latency_s"] for row in rows() if _has(row, "measured")}
    found = []
    predicted = [row for row in rows() if _has(row, "predicted") and (row["scale"], row["uid"]) in measured]
    for scale, target, model in sorted({(row["scale"], row["target"], row["model"]) for row in predicted}):
        own = [row for row in predicted if (row["scale"], row["target"], row["model"]) == (scale, target, model)]
        said, was = (
            np.array(list(each))
            for each in ((row["latency_s"] for row in own), (measured[scale, row["uid"]] for row in own))
        )
        low, high = np.array([row["interval"] for row in own]).T
        ratio = said / was
        figures = {
            "mape": float(np.abs(ratio - 1).mean()),
            "median_ratio": float(np.median(ratio)),
            "mape_scaled": float(np.abs(ratio / np.median(ratio) - 1).mean()),
            "tau": float(kendalltau(said, was).statistic),
            "coverage": float(((low <= was) & (was <= high)).mean()),
        }
        found.append({"scale": scale, "target": target, "model": model, "candidates": len(own), **figures})
    return found


def _has(row: dict[str, Any], what: str) -> bool:
    return row["what"] == what and "error" not in row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h200", help="a GPU of cosearch/targets that is attached")
    parser.add_argument("--scale", choices=tuple(SCALES), nargs="+", default=list(SCALES))
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--workers", type=int, default=4, help="processes that compile at once, to predict")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.report:
        try:
            for scale in options.scale:
                study(scale, options.target, options.candidates, options.workers)
        except UserError as error:
            parser.error(str(error))
    print(json.dumps({"results": report()}))


if __name__ == "__main__":
    main()
