"""How well the latency of whole candidates is predicted on this processor, from measuring some of them.

    python experiments/cpu_latency/run.py --candidates 120 --again 15
    python experiments/cpu_latency/run.py --report
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic

from rich.progress import Progress

from cosearch.__main__ import compose
from cosearch.core.candidate import Candidate
from cosearch.core.errors import Rejected
from cosearch.core.metric import Metric
from cosearch.core.problem import Problem
from cosearch.core.space import Space
from cosearch.core.target import Target
from cosearch.core.trial import Failure, Stage, Trial
from cosearch.measure.fingerprint import fingerprint
from cosearch.measure.process import Worker
from cosearch.paths import cache_dir
from cosearch.proposers import PROPOSERS, Setting
from cosearch.settings import Settings
from cosearch.stages import Compile, Measure, Static, latency_key
from cosearch.targets import TARGETS

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"


def settings() -> Settings:
    """What the default search searches."""
    return Settings.from_config(compose(["experiment=llm_decode"]))


def problem_here(chosen: Settings, worker: Worker) -> Problem:
    """Its problem on the processor at hand."""
    target = TARGETS[chosen.target].target(cache_dir(), lambda: worker.call("peaks", {}, chosen.limits.measure_s))
    return Problem(target, chosen.workload, chosen.objectives, chosen.constraints)


def results(path: Path = RESULTS) -> list[tuple[Trial, Target]]:
    """What is measured so far, in that order; a candidate may be there twice."""
    rows = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return [(Trial.from_json(row), Target.from_json(row["target"])) for row in rows]


def drawn(space: Space, problem: Problem, seed: int) -> Iterator[Candidate]:
    """Random legal candidates, each once."""
    proposer = PROPOSERS["random"](Setting(space, problem, seed, {}))
    while found := proposer.ask(50):
        yield from found


def score(candidate: Candidate, problem: Problem, stages: list[Stage]) -> Trial:
    """Compile and measure one, as a search does."""
    metrics, failure, seconds = {}, None, {}
    for stage in stages:
        start = monotonic()
        try:
            metrics |= stage(candidate, problem)
        except Rejected as rejection:
            failure = Failure(stage.name, str(rejection))
        seconds[stage.name] = round(monotonic() - start, 3)
        if failure:
            break
    metrics = {name: shortened(metric) for name, metric in metrics.items()}
    return Trial(
        candidate, latency_key(candidate, problem), "", metrics, {}, failure, seconds, fingerprint=fingerprint()
    )


def shortened(metric: Metric) -> Metric:
    """With samples of five digits, which is what a clock tells of them."""
    return replace(metric, samples=tuple(float(f"{sample:.5g}") for sample in metric.samples))


def measure(chosen: Settings, candidates: int, again: int, seed: int) -> None:
    """Measure until so many candidates succeeded, then the first of them `again`; append each to `RESULTS`."""
    space = chosen.load_space()
    with Worker() as worker, Progress() as progress:
        problem = problem_here(chosen, worker)
        limits = chosen.limits
        stages = [
            Static(),
            Compile(worker, limits.compile_s),
            Measure(worker, limits.measure_s, chosen.measure_seconds),
        ]
        done = [trial for trial, _ in results()]
        known = {trial.uid for trial in done}
        times = [trial.uid for trial in done if trial.failure is None]
        task = progress.add_task("measuring", total=candidates + again, completed=len(times))

        def add(candidate: Candidate) -> Trial:
            trial = score(candidate, problem, stages)
            with RESULTS.open("a") as file:
                file.write(json.dumps(trial.to_json() | {"target": problem.target.to_json()}) + "\n")
            progress.update(task, advance=trial.failure is None)
            return trial

        first = [trial.candidate for trial in done if trial.failure is None]
        proposals = drawn(space, problem, seed)
        while len(set(times)) < candidates:
            candidate = next(proposals)
            if candidate.uid in known:
                continue
            trial = add(candidate)
            if trial.failure is None:
                times.append(trial.uid)
                first.append(candidate)
        for candidate in first[:again]:
            if times.count(candidate.uid) < 2:
                add(candidate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=120)
    parser.add_argument("--again", type=int, default=15, help="how many of them are measured a second time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    measure(settings(), options.candidates, options.again, options.seed)


if __name__ == "__main__":
    main()
