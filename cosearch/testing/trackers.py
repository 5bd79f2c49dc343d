"""The contract of trackers: they take what runs bring, the hostile included, and write where they should."""

import random
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

from cosearch.core.archive import Archive
from cosearch.core.candidate import Candidate
from cosearch.core.metric import predicted
from cosearch.core.space import Space
from cosearch.core.trial import Failure, Trial
from cosearch.report import TRACKERS, Budget, Comparison, Outcome, Run, Tracker
from cosearch.testing.common import require
from cosearch.testing.proposers import KNOBS, small_problem, small_space, trial_of

_HOSTILE = "<script>alert(1)</script>[bold red]x[/]\x1b]0;owned\x07\n../$page {0} %s :smile: \N{SNOWMAN}"


def check_tracker(name: str, folder: Path) -> None:
    """Check the tracker `name` on two runs under the empty `folder`: one of hostile names, one with no trial at all.

    It must raise nothing, also where it is finished twice, and write nowhere but in the run's folder.
    """
    space, problem = small_space(KNOBS), small_problem()
    problem = replace(
        problem, target=replace(problem.target, name=_HOSTILE), workload=replace(problem.workload, name=_HOSTILE)
    )
    strange = Candidate.from_point({**space.reference.point, "architecture.attention": _HOSTILE})
    candidates = [space.reference, strange, *_drawn(space, 4)]
    kinds = ("", "", "failed", "infeasible", "incomplete", "perfect")
    # The figures are those of a candidate that has sizes; the name is what is strange.
    made = [
        trial_of(space.reference if one is strange else one, problem, kind)
        for one, kind in zip(candidates, kinds, strict=True)
    ]
    trials = [_strange(trial, candidate) for trial, candidate in zip(made, candidates, strict=True)]
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(parents=True)
    with chdir(elsewhere):
        for index, some in enumerate((trials, [])):
            run = Run(folder / f"run {index}", _HOSTILE, problem, replace(space, name=_HOSTILE), Budget(9, 60.0))
            run.folder.mkdir()
            archive = Archive(run.folder / "trials.db", problem, space.reference.uid)
            _watch(TRACKERS[name](run), archive, some, _outcome(run, some))
            archive.close()
    written = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path != elsewhere}
    require(written == {"run 0", "run 1"}, f"files are written to the run's folder only, not to {sorted(written)}")


def _watch(tracker: Tracker, archive: Archive, trials: Sequence[Trial], outcome: Outcome) -> None:
    tracker.start(archive)
    for trial in trials:
        for fraction in (0.0, 0.5, 1.0):
            tracker.progress("measure", _HOSTILE, fraction)
        archive.append(trial)
        tracker.log(trial, archive)
    for _ in range(2):
        tracker.finish(archive, outcome)


def _outcome(run: Run, trials: Sequence[Trial]) -> Outcome:
    if not trials:
        return Outcome()
    uid = trials[0].uid
    folder = run.folder / "artifacts" / uid
    folder.mkdir(parents=True)
    compared = Comparison(uid, trials[1].uid, 1e-3, 2e-3, 2.0, (1.9, 2.1), (1e-3,) * 30, (2e-3,) * 30)
    return Outcome({uid: folder}, compared)


def _drawn(space: Space, count: int) -> list[Candidate]:
    rng, found = random.Random(10), {}
    while len(found) < count:
        candidate = space.sample(rng)
        if candidate != space.reference:
            found[candidate.uid] = candidate
    return list(found.values())


def _strange(trial: Trial, candidate: Candidate) -> Trial:
    latency = trial.metrics.get("latency_s")
    return replace(
        trial,
        candidate=candidate,
        failure=trial.failure and Failure("compile", _HOSTILE),
        predictions={"latency_s": predicted("latency_s", 0.9 * latency.value, (0.5 * latency.value, latency.value))}
        if latency
        else {},
        fingerprint={"processor": _HOSTILE, "cores": 2},
    )
