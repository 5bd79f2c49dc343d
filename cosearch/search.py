"""The outer loop: ask, score by stages, archive, tell; and in the end confirm what was found."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cosearch.core.archive import Archive
from cosearch.core.candidate import Candidate
from cosearch.core.errors import Rejected, UserError
from cosearch.core.metric import Metrics
from cosearch.core.problem import Problem
from cosearch.core.trial import Confirmation, Failure, Proposer, Stage, Trial
from cosearch.measure.fingerprint import fingerprint
from cosearch.report import Budget, Tracker

_BATCH = 6
"""Candidates asked for at a time."""
_HOPELESS = 20
"""Failures in a row after which something else than the candidates must be wrong."""


class Predict(Protocol):
    """What is expected of a candidate before anything is run; empty while nothing is known."""

    def __call__(self, candidate: Candidate) -> Metrics: ...


@dataclass(frozen=True)
class Scoring:
    """How a candidate becomes a trial: its stages, and the keys by which it shares their results."""

    problem: Problem
    stages: Sequence[Stage]
    latency_key: Callable[[Candidate], str]
    quality_key: Callable[[Candidate], str]
    predict: Predict
    considered: Callable[[], int] = lambda: 0
    """How many candidates the proposer has scored by models so far."""


def search(
    reference: Candidate,
    scoring: Scoring,
    proposer: Proposer,
    archive: Archive,
    budget: Budget,
    trackers: Sequence[Tracker],
) -> None:
    """Search until the budget is spent or the proposer has nothing new; what `archive` holds counts as done.

    Raises:
        UserError: the reference fails, or too many candidates in a row do.
    """
    proposer.tell(list(archive))
    for tracker in trackers:
        tracker.start(archive)
    batch, asked_s, failures, considered = [reference], 0.0, 0, 0
    while len(archive) < budget.trials and archive.seconds < budget.seconds:
        if not batch:
            start = time.monotonic()
            batch = list(proposer.ask(min(_BATCH, budget.trials - len(archive))))
            asked_s += time.monotonic() - start
        if not batch:
            return
        candidate = batch.pop(0)
        if candidate.uid in archive:
            continue
        before, considered = considered, scoring.considered()
        trial = replace(score(candidate, scoring, archive, trackers, asked_s), considered=considered - before)
        asked_s = 0.0
        archive.append(trial)
        proposer.tell([trial])
        for tracker in trackers:
            tracker.log(trial, archive)
        failures = failures + 1 if trial.failure else 0
        if candidate == reference and not trial.failure and scoring.problem.losses(trial.values, trial.values) is None:
            names = ", ".join(objective.metric for objective in scoring.problem.objectives)
            raise UserError(
                f"losses are relative to the reference, and its {names} are not all above 0: {trial.values}"
            )
        if trial.failure and (candidate == reference or failures == _HOPELESS):
            what = (
                "the reference candidate fails" if candidate == reference else f"{failures} candidates in a row failed"
            )
            raise UserError(
                f"{what}, so the search stops; {candidate.uid} at {trial.failure.stage}: {trial.failure.reason}"
            )


def confirm(
    measure: Callable[[Candidate], Metrics], archive: Archive, seconds: float, trackers: Sequence[Tracker]
) -> None:
    """Measure the reference and what would enter the front once more, each in a fresh process, for about `seconds`.

    A trial that was measured in a lucky minute would otherwise be on the front for that; of thousands that are equal
    some always are. What there was no time to confirm is not on the front; for one of it, there always is.
    """
    until = time.monotonic() + seconds
    while waiting := archive.unconfirmed():
        if not archive[archive.reference_uid].confirmed:
            waiting.insert(0, archive[archive.reference_uid])
        elif time.monotonic() >= until and any(one.uid != archive.reference_uid for one in archive.settled()):
            return
        uid, start, metrics, failure = waiting[0].uid, time.monotonic(), {}, None
        for tracker in trackers:
            tracker.progress("confirm", f"{uid}, {len(waiting)} to go", 1 / (1 + len(waiting)))
        try:
            metrics = measure(waiting[0].candidate)
        except Rejected as rejection:
            failure = Failure("confirm", str(rejection))
        archive.confirm(Confirmation(uid, metrics, failure, time.monotonic() - start))


def score(
    candidate: Candidate, scoring: Scoring, archive: Archive, trackers: Sequence[Tracker], asked_s: float = 0.0
) -> Trial:
    """Run a candidate through the stages until one refuses it; results of equal keys are taken from the archive.

    `asked_s` is what it took to propose it, which counts as its first stage.
    """
    keys = {"latency_key": scoring.latency_key(candidate), "quality_key": scoring.quality_key(candidate)}
    metrics, reused, failure = {}, [], None
    start = time.monotonic()
    predictions = scoring.predict(candidate)
    seconds = {"propose": asked_s + time.monotonic() - start}
    for index, stage in enumerate(scoring.stages):
        for tracker in trackers:
            tracker.progress(stage.name, candidate.uid, index / len(scoring.stages))
        shared = archive.shared(stage.depends_on, keys[stage.depends_on], stage.provides)
        if shared is not None:
            metrics |= shared
            reused += sorted(shared)
            continue
        start = time.monotonic()
        try:
            scored = stage(candidate, scoring.problem)
            for name, metric in scored.items():
                if not math.isfinite(metric.value):
                    raise Rejected(f"{name} is {metric.value}")
            metrics |= scored
        except Rejected as rejection:
            failure = Failure(stage.name, str(rejection))
        seconds[stage.name] = time.monotonic() - start
        if failure:
            break
    return Trial(
        candidate,
        latency_key=keys["latency_key"],
        quality_key=keys["quality_key"],
        metrics=metrics,
        predictions=predictions,
        failure=failure,
        seconds=seconds,
        reused=tuple(reused),
        fingerprint=fingerprint(),
    )
