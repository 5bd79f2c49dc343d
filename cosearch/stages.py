"""The stages that score a candidate, cheap ones first: static, compile, verify, measure, quality. For a chip that is
not here, predicting takes the place of measuring.

Each asks the worker process for the work and turns its reply into metrics; limits in seconds are the parent's.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cosearch import axes
from cosearch.core.candidate import Candidate, content_hash
from cosearch.core.errors import Rejected, UserError
from cosearch.core.metric import Z90, Metric, Metrics, Source, measured
from cosearch.core.problem import Problem
from cosearch.core.target import Target
from cosearch.latency import absent, power, roofline
from cosearch.latency.features import work
from cosearch.latency.hlo import HloFeatures
from cosearch.measure import energy, timing
from cosearch.measure.process import Progress, Worker
from cosearch.quality import Recipe
from cosearch.schedule import Schedule

_BELOW_FLOOR = 0.5
"""A median below this part of the roofline's floor cannot be: the peaks are measured too, and may be a little low."""


@dataclass(frozen=True)
class Limits:
    """Seconds that each kind of work may take before its worker is killed."""

    compile_s: float = 60.0
    verify_s: float = 60.0
    measure_s: float = 60.0
    quality_s: float = 300.0
    artifact_s: float = 120.0


@dataclass(frozen=True)
class Static:
    """Refuses what cannot fit into the target's memory."""

    name = "static"
    depends_on = "latency_key"
    provides = frozenset({"parameters"})

    def __call__(self, candidate: Candidate, problem: Problem) -> Metrics:
        done = [work(candidate, point) for point in problem.workload.points]
        needed = max(one.weight_bytes + one.cache_bytes for one in done)
        if needed > problem.target.capacity_bytes:
            raise Rejected(f"needs {needed:.3g} bytes; {problem.target.name} has {problem.target.capacity_bytes:.3g}")
        return {"parameters": measured("parameters", done[0].parameters)}


@dataclass(frozen=True)
class Compile:
    """Compiles every operating point, and counts the bytes in memory.

    What it runs with is drawn anew for each candidate and `purpose`, "search" or "confirm".
    """

    worker: Worker
    limit_s: float
    purpose: str = "search"
    name = "compile"
    depends_on = "latency_key"
    provides = frozenset({"compile_s", "weight_bytes", "cache_bytes", "memory_bytes", "copied_bytes"})

    def __call__(self, candidate: Candidate, problem: Problem) -> Metrics:
        if problem.target.attached:
            arguments = {"seed": seed_of(candidate, self.purpose)}
        else:
            arguments = {"absent": problem.target.name}
        task = "compile" if problem.target.attached else "compile_for_absent"
        arguments |= {"point": candidate.point, "workload": problem.workload.to_json()}
        reply = self.worker.call(task, arguments, self.limit_s)
        return {name: measured(name, reply[name]) for name in sorted(self.provides)}


@dataclass(frozen=True)
class Verify:
    """Compares what was compiled with float64 (`measure/verify.py`). What was compiled for a chip that is not here
    cannot be run: then it is the `portable` form of the same mathematics, as XLA alone runs it on this machine."""

    worker: Worker
    limit_s: float
    portable: bool = False
    name = "verify"
    depends_on = "latency_key"

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"portable_error" if self.portable else "numerical_error"})

    def __call__(self, candidate: Candidate, problem: Problem) -> Metrics:
        task, arguments = "verify", {"point": candidate.point}
        if self.portable:
            own = {"workload": problem.workload.to_json(), "seed": seed_of(candidate, "search")}
            task, arguments = "verify_portable", arguments | own
        reply = self.worker.call(task, arguments, self.limit_s)
        return {name: measured(name, reply[name]) for name in self.provides}


@dataclass(frozen=True)
class Predict:
    """Predicts what was compiled for a chip that is not here (`latency/absent.py`), and its energy where that is asked
    for."""

    worker: Worker
    limit_s: float
    energy: Source | None = None
    name = "predict"
    depends_on = "latency_key"

    @property
    def provides(self) -> frozenset[str]:
        return _timed(self.energy)

    def __call__(self, candidate: Candidate, problem: Problem) -> Metrics:
        reply = self.worker.call("features", {"point": candidate.point}, self.limit_s)
        features = [HloFeatures.from_json(one) for one in reply["features"]]
        by_point = absent.estimate(candidate, problem, features)
        latency = {"latency_s": over_workload(by_point, problem)}
        return latency | ({"energy_j": power.energy(candidate, problem, by_point)} if self.energy else {})


@dataclass(frozen=True)
class Measure:
    """Times what was compiled and verified, on cold data (`measure/bench.py`), and refuses what cannot be; and counts
    its energy (`measure/energy.py`), or predicts it, where that is asked for."""

    worker: Worker
    limit_s: float
    seconds: float
    energy: Source | None = None
    name = "measure"
    depends_on = "latency_key"

    @property
    def provides(self) -> frozenset[str]:
        return _timed(self.energy)

    def __call__(self, candidate: Candidate, problem: Problem) -> Metrics:
        arguments = {"point": candidate.point, "seconds": self.seconds, "cold_bytes": cold_bytes(problem)}
        reply = self.worker.call("measure", arguments, self.limit_s)
        samples_s = reply["samples_s"]
        for point, samples in zip(problem.workload.points, samples_s, strict=True):
            steps = Schedule.of(candidate.schedule).steps if point.phase == "decode" else 1
            floor = roofline.floor_s(work(candidate, point), problem.target, steps)
            if np.median(samples) < _BELOW_FLOOR * floor:
                raise Rejected(
                    f"impossible: {np.median(samples):.3g} s for {point.phase} at context {point.context}, where the "
                    f"target's peaks allow no less than {floor:.3g} s"
                )
        by_point = latencies(samples_s, problem)
        latency = {"latency_s": replace(over_workload(by_point, problem), contended=max(reply["contended"]))}
        if self.energy == "measured":
            arguments = {"point": candidate.point, "cold_bytes": cold_bytes(problem)}
            reply = self.worker.call("energy", arguments, self.limit_s)
            return latency | {"energy_j": workload_energy(reply["joules"], reply["steps"], problem)}
        return latency | ({"energy_j": power.energy(candidate, problem, by_point)} if self.energy else {})


@dataclass(frozen=True)
class Quality:
    """Trains the architecture if no run has, and evaluates it as it would be served."""

    worker: Worker
    limit_s: float
    recipe: Recipe
    corpus: str
    cache: Path
    progress: Progress
    name = "quality"
    depends_on = "quality_key"
    provides = frozenset({"bits_per_byte", "recall_accuracy"})

    def __call__(self, candidate: Candidate, problem: Problem) -> Metrics:
        arguments = {
            "point": candidate.point,
            "recipe": self.recipe.to_json(),
            "corpus": self.corpus,
            "cache": str(self.cache),
        }
        reply = self.worker.call("quality", arguments, self.limit_s, self.progress)
        return {name: _mean_of(name, reply[name]) for name in sorted(self.provides)}


def cold_bytes(problem: Problem) -> int:
    """How many bytes runs must go round for each to find its data in memory: twice what the caches hold, for they do
    not always give up what was used longest ago."""
    return 2 * problem.target.cache_bytes


def seed_of(candidate: Candidate, purpose: str) -> int:
    """What draws the weights and tokens that a candidate is run with."""
    return int(content_hash([candidate.uid, purpose]), 16)


def latency_key(candidate: Candidate, problem: Problem) -> str:
    """What latency depends on: all four axes, the target and the workload, not the weights' values."""
    return content_hash([candidate.point, problem.target.to_json(), problem.workload.to_json()])


def quality_key(candidate: Candidate, recipe: Recipe, corpus_digest: str) -> str:
    """What quality depends on: the model and its training, not the schedule."""
    return content_hash([candidate.quality_axes_key, recipe.to_json(), corpus_digest])


def workload_latency(samples_s: list[list[float]], problem: Problem) -> Metric:
    """`latency_s` of raw samples by operating point: each one's median and interval, weighted."""
    return over_workload(latencies(samples_s, problem), problem)


def latencies(samples_s: list[list[float]], problem: Problem) -> list[Metric]:
    """`latency_s` at each operating point: the seconds of a token of one sequence, from raw samples of runs."""
    each = zip(problem.workload.points, samples_s, strict=True)
    return [
        _each("latency_s", timing.median_interval(samples), point.tokens / point.batch, samples)
        for point, samples in each
    ]


def workload_energy(joules: list[list[float]], steps: list[list[int]], problem: Problem) -> Metric:
    """`energy_j` of what was counted by operating point: each one's joules a step, over the tokens of all sequences,
    weighted."""
    each = zip(problem.workload.points, joules, steps, strict=True)
    by_point = [
        _each(
            "energy_j",
            energy.joules_a_run(j, n),
            point.tokens,
            [drawn / done for drawn, done in zip(j, n, strict=True)],
        )
        for point, j, n in each
    ]
    return over_workload(by_point, problem)


def _each(name: str, found: tuple[float, tuple[float, float]], tokens: float, samples: Sequence[float]) -> Metric:
    """A measured metric of a token, of what a run of so many takes, its interval and samples."""
    value, (low, high) = found
    return measured(name, value / tokens, interval=(low / tokens, high / tokens), samples=tuple(samples))


def over_workload(by_point: Sequence[Metric], problem: Problem) -> Metric:
    """The mean of a metric over operating points, by their weights. The interval takes all to be off to the same side
    at once."""
    weights = np.array([point.weight for point in problem.workload.points])
    figures = [(one.value, *(one.interval or (one.value, one.value))) for one in by_point]
    value, low, high = (float(one) for one in weights / weights.sum() @ figures)
    samples = tuple(itertools.chain(*(one.samples for one in by_point)))
    return replace(by_point[0], value=value, interval=(low, high), samples=samples)


def energy_source(worker: Worker, problem: Problem, limits: Limits) -> Source | None:
    """Whether `energy_j` is measured here or predicted; None where the problem does not ask for it.

    Raises:
        UserError: it can be neither.
    """
    if "energy_j" not in problem.reads:
        return None
    target = problem.target
    why = f"no {target.name} is attached"
    if target.attached:
        why = worker.call("energy_counter", {}, limits.measure_s)["why_uncounted"]
    if why is None:
        return "measured"
    if target.power_w is None:
        raise UserError(
            f"energy_j can be neither measured nor predicted for target={target.name}: {why}; and what it draws at "
            "most is not known"
        )
    return "predicted"


def _timed(energy: Source | None) -> frozenset[str]:
    """What timing gives, measured or predicted."""
    return frozenset({"latency_s"} if energy is None else {"latency_s", "energy_j"})


def check_options(worker: Worker, space: Any, target: Target, limits: Limits) -> Mapping[tuple[str, ...], str]:
    """The sets of compiler options of a space for this target that the installed XLA refuses, and why."""
    sets = space.knobs.get("schedule.compiler_options", ())
    arguments = {"option_sets": [list(options) for options in sets], "absent": None if target.attached else target.name}
    reply = worker.call("options", arguments, limits.compile_s)
    return {sets[int(index)]: why for index, why in reply["refused"].items()}


def _mean_of(name: str, samples: list[float]) -> Metric:
    """The mean with its 90 % interval, from the spread over the samples."""
    mean, error = float(np.mean(samples)), float(np.std(samples) / max(len(samples) - 1, 1) ** 0.5)
    return measured(name, mean, interval=(mean - Z90 * error, mean + Z90 * error), samples=tuple(samples))


def compare_with_plain(
    worker: Worker, candidate: Candidate, problem: Problem, limits: Limits, rounds: int = 600
) -> tuple[Candidate, list[list[list[float]]]]:
    """A candidate and the same architecture the plain way, timed side by side: samples by operating point and side."""
    plain = axes.plain(candidate)
    arguments = {
        "points": [candidate.point, plain.point],
        "workload": problem.workload.to_json(),
        "rounds": rounds,
        "seconds": limits.measure_s / (4 * len(problem.workload.points)),
        "cold_bytes": cold_bytes(problem),
    }
    return plain, worker.call("compare", arguments, limits.measure_s + 2 * limits.compile_s)["samples_s"]
