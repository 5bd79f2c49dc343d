"""Does a search that measures few candidates find as good a front as measuring a whole sample of the space?

    python experiments/sample_front/run.py --sample 400                    # hours; what is done is kept
    python experiments/sample_front/run.py --sample 400 --run runs/llm_decode/...    # compare with a run that is there

Latencies that experiments/cpu_latency has measured are taken from there; qualities are trained and evaluated here.
README.md says what the figures are and how they came out.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from cosearch import run as runs
from cosearch.__main__ import compose
from cosearch.core import pareto
from cosearch.core.archive import Archive
from cosearch.core.candidate import Candidate
from cosearch.core.errors import Rejected, UserError
from cosearch.core.problem import Problem
from cosearch.measure.fingerprint import fingerprint
from cosearch.measure.process import Worker
from cosearch.paths import cache_dir
from cosearch.proposers import PROPOSERS, Setting
from cosearch.report.pareto import effort
from cosearch.settings import Settings
from cosearch.stages import Compile, Measure, Quality, Static, Verify
from cosearch.targets import TARGETS

HERE = Path(__file__).parent
RESULTS, LATENCIES = HERE / "results.jsonl", HERE.parent / "cpu_latency" / "results.jsonl"
NAMES = ("latency_s", "bits_per_byte", "recall_accuracy")


def known() -> dict[str, dict[str, Any]]:
    """What was measured of each candidate, by uid: here, and of latencies there; an "error" where it failed."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows(LATENCIES):
        uid = Candidate.from_point(row["point"]).uid
        latency = {"error": row["failure"]["reason"]} if row["failure"] else value_of(row["metrics"], "latency_s")
        found.setdefault(uid, latency)
    for row in rows(RESULTS):
        found[row["uid"]] = found.get(row["uid"], {}) | row
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none where it is not there."""
    return list(map(json.loads, path.read_text().splitlines())) if path.is_file() else []


def value_of(metrics: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The values of metrics that were stored."""
    return {name: metrics[name]["value"] for name in names}


def sample(settings: Settings, problem: Problem, count: int) -> list[Candidate]:
    """The reference, and so many candidates as experiments/cpu_latency draws them."""
    space = settings.load_space()
    return [space.reference, *PROPOSERS["random"](Setting(space, problem, 0, {})).ask(count)]


def measure(settings: Settings, count: int) -> None:
    """Measure what is not known of the sample, and append it to `RESULTS`. Candidates of one architecture come one
    after the other, so that it is trained once."""
    with Worker() as worker:
        problem, limits = problem_here(settings, worker), settings.limits
        compiled = (Static(), Compile(worker, limits.compile_s), Verify(worker, limits.verify_s))
        timed = (*compiled, Measure(worker, limits.measure_s, settings.measure_seconds))
        scored = Quality(
            worker, limits.quality_s, settings.quality, settings.corpus, cache_dir(), lambda detail, fraction: None
        )
        done = known()
        waiting = [
            one
            for one in sample(settings, problem, count)
            if not done.get(one.uid, {}).keys() >= set(NAMES) and "error" not in done.get(one.uid, {})
        ]
        for candidate in track(sorted(waiting, key=lambda one: one.key("architecture")), "measuring"):
            found = {"uid": candidate.uid, **done.get(candidate.uid, {})}
            try:
                for stage in () if "latency_s" in found else timed:
                    found |= {n: m.value for n, m in stage(candidate, problem).items() if n in NAMES}
                found |= {name: metric.value for name, metric in scored(candidate, problem).items()}
            except Rejected as rejection:
                found["error"] = str(rejection)
            with RESULTS.open("a") as file:
                file.write(json.dumps(found) + "\n")


def refuse_others() -> None:
    """Raises UserError where latencies are there that another processor took."""
    here = fingerprint()["processor"]
    for row in rows(LATENCIES):
        there = row.get("fingerprint", {}).get("processor", here)
        if there != here:
            raise UserError(
                f"{LATENCIES}: has latencies of {there}, and this is {here}. To measure here, move that file "
                f"and {RESULTS} away"
            )


def problem_here(settings: Settings, worker: Worker) -> Problem:
    """The default problem on the processor at hand."""
    target = TARGETS[settings.target].target(cache_dir(), lambda: worker.call("peaks", {}, settings.limits.measure_s))
    return Problem(target, settings.workload, settings.objectives, settings.constraints)


def hypervolume(values: Sequence[Mapping[str, float]], reference: Mapping[str, float], problem: Problem) -> float:
    """Of what keeps the constraints, relative to `reference`."""
    kept = [one for one in values if problem.excess(one, reference) == 0]
    losses = [row for one in kept if (row := problem.losses(one, reference)) is not None]
    return pareto.hypervolume(np.array(losses)) if losses else 0.0


def searched(folder: Path, settings: Settings, problem: Problem) -> Archive:
    """The trials of a run, of which those on its front were measured once more."""
    return Archive(folder / runs.ARCHIVE, problem, settings.load_space().reference.uid)


def study(count: int, run: Path | None) -> dict[str, Any]:
    """The figures, after measuring what is not known of a sample of `count`, and searching where no `run` is given.

    Raises:
        UserError: latencies are of another processor than this, or `run` is of another problem.
    """
    config = compose(["experiment=llm_decode"])
    settings = Settings.from_config(config)
    refuse_others()
    with Worker() as worker:
        problem = problem_here(settings, worker)
    archive = None if run is None else searched(run, settings, problem)
    measure(settings, count)
    if archive is None:
        archive = searched(runs.start(config).folder, settings, problem)
    done = known()
    drawn = sample(settings, problem, count)
    values = [done[one.uid] for one in drawn if done.get(one.uid, {}).keys() >= set(NAMES)]
    reference = done[drawn[0].uid]
    whole = hypervolume(values, reference, problem)
    front = hypervolume([trial.values for trial in archive.front()], archive.reference, problem)
    return {
        "sample": len(values),
        "sample_failed": sum("error" in done.get(one.uid, {}) for one in drawn),
        "sample_hypervolume": whole,
        "search_hypervolume": front,
        "ratio": front / whole,
        "trials": len(archive),
        **effort(archive),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=400, help="how many random candidates are measured")
    parser.add_argument("--run", type=Path, help="the folder of a default search; a new one is run if not given")
    options = parser.parse_args()
    try:
        print(json.dumps(study(options.sample, options.run)))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
