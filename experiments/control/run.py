"""Does the surrogate find more than the controls in the same time? See README.md beside this file.

.venv/bin/python experiments/control/run.py [--seconds 480] [--seeds 1] [--proposers surrogate nevergrad random]
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import plotly.graph_objects as go

from cosearch import axes
from cosearch.core import pareto
from cosearch.core.archive import Archive
from cosearch.core.problem import Constraint, Objective, Problem
from cosearch.core.target import Target
from cosearch.core.workload import Workload

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Run every proposer and seed, append the results to `results.jsonl`, draw the figure, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--proposers", nargs="+", default=["surrogate", "nevergrad", "random"])
    options = parser.parse_args()
    jobs = [(proposer, seed) for seed in range(options.seeds) for proposer in options.proposers]
    random.Random(0).shuffle(jobs)  # a load that comes and goes must not meet one side only
    results = []
    for proposer, seed in jobs:
        print(f"{proposer}, seed {seed}", file=sys.stderr, flush=True)
        results.append(_search(proposer, seed, options.seconds))
        with open(HERE / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(results[-1]) + "\n")
    _draw(results).write_html(HERE / "figure.html", include_plotlyjs="cdn")
    print(json.dumps({"results": results}))


def _search(proposer: str, seed: int, seconds: float) -> dict:
    """One search with an empty cache, so that nobody profits from what another has trained."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cosearch", "experiment=llm_decode", f"proposer={proposer}", f"seed={seed}"]
        command += [f"budget.seconds={seconds}", "budget.trials=1000", f"output={folder}/runs", "trackers=[]"]
        subprocess.run(command, check=True, env={**os.environ, "COSEARCH_CACHE": f"{folder}/cache"})
        run = next((Path(folder) / "runs" / "llm_decode").iterdir())
        data = json.loads((run / "pareto.json").read_text())
        spent, course = 0.0, []
        archive = _archive(run, data)
        feasible, found = {trial.uid for trial in archive.feasible()}, []
        for trial in archive:
            spent += sum(trial.seconds.values())
            found += [trial] if trial.uid in feasible else []
            course.append([round(spent, 1), round(pareto.hypervolume(archive.losses(found)), 4)])
        architectures = {trial.candidate.key("architecture") for trial in archive}
        return {
            "proposer": proposer,
            "seed": seed,
            "seconds": round(spent, 1),
            "trials": len(archive),
            "architectures": len(architectures),
            "front": len(data["points"]),
            "hypervolume": round(data["hypervolume"], 4),
            "course": course,
        }


def _archive(run: Path, data: dict) -> Archive:
    problem = Problem(
        Target.from_json(data["problem"]["target"]),
        Workload.from_json(data["problem"]["workload"]),
        tuple(map(Objective.parse, data["problem"]["objectives"])),
        tuple(map(Constraint.parse, data["problem"]["constraints"])),
    )
    return Archive(run / "trials.db", problem, axes.load_space("llm_decode").reference.uid)


def _draw(results: list[dict]) -> go.Figure:
    figure = go.Figure()
    for result in results:
        spent, volume = zip(*result["course"], strict=True)
        name = f"{result['proposer']}, seed {result['seed']}"
        figure.add_scatter(x=spent, y=volume, mode="lines", line_shape="hv", name=name)
    figure.update_layout(xaxis_title="seconds of trials", yaxis_title="hypervolume", template="plotly_white")
    return figure


if __name__ == "__main__":
    main()
