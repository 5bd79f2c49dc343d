"""The contract of proposers: legal candidates, each once, whatever they are told; and the small space of that."""

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cosearch import axes
from cosearch.core.candidate import Candidate
from cosearch.core.metric import Metric, measured
from cosearch.core.problem import Constraint, Objective, Problem
from cosearch.core.space import Space
from cosearch.core.target import Target
from cosearch.core.trial import Failure, Proposer, Trial
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.latency import roofline
from cosearch.proposers import PROPOSERS, Setting
from cosearch.testing.common import NONE, require

KNOBS: Mapping[str, Sequence[Any]] = {
    "architecture.width": [32, 64],
    "architecture.depth": [1, 2],
    "architecture.head_dim": [16],
    "architecture.attention": ["mha", "gqa", "sliding_window"],
    "architecture.kv_heads": [1, 2],
    "architecture.window": [8, 16],
    "precision.weights": ["float32", "bfloat16", "int8"],
    "sparsity.pattern": ["dense", "structured"],
    "schedule.layers": ["scan", "unroll"],
    "schedule.cache_layout": ["bshd", "bhsd", "bhds"],
}
_THREE: Mapping[str, Sequence[Any]] = {
    "architecture.width": [32],
    "architecture.depth": [1],
    "architecture.head_dim": [16],
    "schedule.cache_layout": ["bshd", "bhsd", "bhds"],
}
_ASKS = 40
"""Asks after which a space of three points must be exhausted."""


def check_proposer(name: str, options: Mapping[str, Any] = NONE) -> None:
    """Check the proposer `name`: legal candidates, each once, the same for a seed, whatever it is told."""
    space, problem = small_space(KNOBS), small_problem()

    def make(seed: int) -> Proposer:
        return PROPOSERS[name](Setting(space, problem, seed, options))

    first, same = (_asked(make(7), space, (1, 7, 0, 12), set()) for _ in range(2))
    require(
        len(first) == 20, f"a space of hundreds of points gives 20 candidates when asked for them, not {len(first)}"
    )
    require(
        [candidate.uid for candidate in first] == [candidate.uid for candidate in same],
        "equal seeds give the same first 20 candidates",
    )

    proposer, known = make(8), {space.reference.uid}
    proposer.tell([])
    proposer.tell([trial_of(space.reference, problem)])
    archive = [trial_of(space.reference, problem)]
    for kind in ("failed", "infeasible", "perfect", "incomplete", "", ""):
        asked = _asked(proposer, space, (4,), known)
        told = [trial_of(candidate, problem, kind) for candidate in asked]
        proposer.tell(told)
        archive += told
        known |= {trial.uid for trial in told}
        require(len(asked) > 0, f"told of trials, it proposes more; after {len(archive)} trials it proposes nothing")

    resumed = make(8)
    resumed.tell(archive)
    require(
        len(_asked(resumed, space, (8, 8), set(known))) > 0, "told of an archive, it proposes what is not in there yet"
    )
    _check_exhaustion(name, options, problem)


def _check_exhaustion(name: str, options: Mapping[str, Any], problem: Problem) -> None:
    space = small_space(_THREE)
    proposer = PROPOSERS[name](Setting(space, problem, 9, options))
    proposer.tell([trial_of(space.reference, problem)])
    known = {space.reference.uid}
    for _ in range(_ASKS):
        if len(known) == 3:
            break
        asked = _asked(proposer, space, (4,), known)
        proposer.tell([trial_of(candidate, problem) for candidate in asked])
        known |= {candidate.uid for candidate in asked}
    require(len(known) == 3, f"all of a space of 3 points is found in {_ASKS} asks, not {len(known)} points")
    require(len(proposer.ask(4)) == 0, "an exhausted space gives no candidates")


def _asked(proposer: Proposer, space: Space, counts: Sequence[int], known: set[str]) -> list[Candidate]:
    """Ask for so many at a time; all must be legal, and neither among `known` nor asked twice."""
    found: list[Candidate] = []
    for count in counts:
        candidates = list(proposer.ask(count))
        require(len(candidates) <= count, f"asked for {count}, it gives no more, not {len(candidates)}")
        for candidate in candidates:
            point = candidate.point
            require(space.canonical(point) == point, f"candidates are canonical; this has inactive knobs: {point}")
            why = space.why_invalid(point)
            require(why is None, f"candidates are legal; this is not: {why}")
            first = {knob: values[0] for knob, values in space.knobs.items()}
            missing = set(space.canonical(first | point)) - point.keys()
            require(not missing, f"candidates have all their active knobs; {sorted(missing)} are missing")
            for knob, value in point.items():
                require(value in space.knobs[knob], f"values are the space's own, not {knob}={value!r}")
            uids = known | {one.uid for one in found}
            require(candidate.uid not in uids, f"no candidate is proposed twice, nor one it was told of: {point}")
            found.append(candidate)
    return found


def small_space(knobs: Mapping[str, Sequence[Any]]) -> Space:
    """A space of these knobs, with the axes' own conditions and rules; its reference takes each knob's first value."""
    reference = {knob: values[0] for knob, values in knobs.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.yaml"
        path.write_text(yaml.safe_dump({"knobs": {k: list(v) for k, v in knobs.items()}, "reference": reference}))
        return axes.load_space(str(path))


def reasons(why_not: Callable[[Candidate], str | None], space: Space) -> dict[Candidate, str | None]:
    """What `why_not` answers of every candidate of a small space: None of one at least, and a text where not None."""
    candidates = filter(None, map(space.candidate, space.points()))
    found = {candidate: why_not(candidate) for candidate in candidates}
    for why in found.values():
        require(why is None or (isinstance(why, str) and why.strip() != ""), f"why not is told in words, not {why!r}")
    first = next(iter(found.values()))
    require(
        None in found.values(), f"of {len(found)} small candidates one at least is not refused; the first is: {first}"
    )
    return found


def small_problem() -> Problem:
    """Latency, memory and quality on a made-up processor."""
    return Problem(
        Target("chip", "cpu", "made up", {"float32": 1e11}, 1e10, 1 << 34, 2, 1e-6),
        Workload("short", (OperatingPoint("decode", 1, 32),)),
        (Objective.parse("minimize latency_s"), Objective.parse("minimize bits_per_byte")),
        (Constraint.parse("recall_accuracy >= 0.5 * reference"),),
    )


def trial_of(candidate: Candidate, problem: Problem, kind: str = "") -> Trial:
    """A made-up trial: by the roofline and a draw that depends on the candidate only; or one of some awkward kind."""
    factor = 1 + random.Random(candidate.uid).random()
    latency = factor * roofline.latency_s(candidate, problem.workload, problem.target)
    values = {
        "latency_s": latency,
        "memory_bytes": 1e6 * factor,
        "bits_per_byte": 2.0 + factor,
        "recall_accuracy": 0.0 if kind == "infeasible" else 0.8,
    }
    if kind == "perfect":
        values = {"latency_s": 1e-12, "memory_bytes": 1.0, "bits_per_byte": 1e-6, "recall_accuracy": 1.0}
    if kind == "incomplete":
        del values["bits_per_byte"], values["recall_accuracy"]
    metrics: dict[str, Metric] = {name: measured(name, value) for name, value in values.items()}
    return Trial(
        candidate,
        latency_key=candidate.uid,
        quality_key=candidate.quality_axes_key,
        metrics={} if kind == "failed" else metrics,
        failure=Failure("compile", "made to fail") if kind == "failed" else None,
        seconds={"compile": 1.0} if kind == "failed" else {"compile": 1.0, "quality": 10.0},
    )
