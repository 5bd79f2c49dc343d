"""A run from its settings to its artifacts: started, resumed, or reported on anew."""

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from cosearch.core.archive import Archive
from cosearch.core.candidate import Candidate
from cosearch.core.errors import Rejected, UserError
from cosearch.core.files import write_json, write_text
from cosearch.core.metric import Metrics, Source
from cosearch.core.problem import Problem
from cosearch.core.space import Space, read_yaml
from cosearch.core.target import Target
from cosearch.core.trial import Proposer, Stage, Trial
from cosearch.latency import absent, power
from cosearch.measure import timing
from cosearch.measure.process import Worker, WorkerFailed
from cosearch.paths import cache_dir
from cosearch.proposers import PROPOSERS, Setting
from cosearch.proposers.surrogate import SurrogateProposer
from cosearch.quality import corpus
from cosearch.report import TRACKERS, Comparison, Outcome, Run, Tracker, pareto
from cosearch.search import Scoring, confirm, search
from cosearch.settings import VERSION, Settings
from cosearch.stages import (
    Compile,
    Limits,
    Measure,
    Predict,
    Quality,
    Static,
    Verify,
    check_options,
    compare_with_plain,
    energy_source,
    latency_key,
    quality_key,
    workload_latency,
)
from cosearch.targets import TARGETS
from cosearch.targets.workplace import Workplace

CONFIG, ARCHIVE, COMPARISON, ARTIFACTS = "config.yaml", "trials.db", "comparison.json", "artifacts"
NO_COMPARISON = "comparison.failed"
_LEAST_FREE_BYTES = 300_000_000
_CONFIRMING, _LEAST_CONFIRMING_S = 0.5, 60.0
"""What part of a budget's seconds may be spent after it on measuring the front once more, and the least there is."""
_NEAR_BEST = 1.01
"""Within 1 % of the best bits per byte: among those points the fastest is compared with its plain form."""


def start(config: Mapping[str, Any]) -> Run:
    """Check the settings, make a run folder, search, and write the artifacts.

    Raises:
        UserError: the settings are wrong; then no folder is made.
    """
    settings = Settings.from_config(config)
    space, place = settings.load_space(), Workplace.of(settings.target)
    with place.worker() as worker:
        problem = _problem(settings, place, worker)
        energy = energy_source(worker, problem, settings.limits)
        _check_compiler_options(space, worker, problem.target, settings)
        digest = corpus.load(settings.corpus).digest
        proposer = _proposer(settings, space, problem)
        folder = _new_folder(Path(config["output"]), settings.experiment)
        saved = {"version": VERSION, **config, "attached": place.attached}
        write_text(folder / CONFIG, yaml.safe_dump(saved, sort_keys=False))
        return _continue(folder, settings, space, problem, proposer, place, worker, digest, energy)


def resume(folder: Path) -> Run:
    """Continue a run after any stop.

    Raises:
        UserError: this is no run folder, it is of another version, another process works on it, or it was started where
            its target was attached and is not here, or the other way round.
    """
    settings = read_settings(folder)
    space, place = settings.load_space(), Workplace.of(settings.target)
    if place.attached != (settings.attached is not False):
        figures, here = ("predicted", "is") if place.attached else ("measured", "is not")
        raise UserError(f"run={folder}: its figures are {figures}; here {settings.target} {here} attached")
    with place.worker() as worker:
        digest = corpus.load(settings.corpus).digest
        problem = _problem(settings, place, worker)
        proposer = _proposer(settings, space, problem)
        energy = energy_source(worker, problem, settings.limits)
        return _continue(folder, settings, space, problem, proposer, place, worker, digest, energy)


def report(folder: Path) -> Run:
    """Write `pareto.json` and what the trackers write, from the archive as it is."""
    settings = read_settings(folder)
    space = settings.load_space()
    # Nothing is run: what counts is where the figures are from.
    place = Workplace(settings.target, settings.attached is not False, TARGETS[settings.target].environment)
    with place.worker() as worker, _locked(folder):
        run = Run(folder, settings.experiment, _problem(settings, place, worker), space, settings.budget)
        archive = Archive(folder / ARCHIVE, run.problem, space.reference.uid)
        _tell_outcome(run, archive, [TRACKERS[name](run) for name in settings.trackers])
    return run


def read_settings(folder: Path) -> Settings:
    """The settings of the run in `folder`.

    Raises:
        UserError: this is no run folder, or it is of another version.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"run={folder}: no run folder, since it has no {CONFIG}")
    config = read_yaml(path)
    if config.get("version") != VERSION:
        raise UserError(
            f"{path}: version {config.get('version')!r}; this cosearch reads run folders of version {VERSION}"
        )
    return Settings.from_config(config, str(path))


def _continue(
    folder: Path,
    settings: Settings,
    space: Space,
    problem: Problem,
    proposer: Proposer,
    place: Workplace,
    worker: Worker,
    digest: str,
    energy: Source | None,
) -> Run:
    run = Run(folder, settings.experiment, problem, space, settings.budget)
    with _locked(folder):
        archive = Archive(folder / ARCHIVE, problem, space.reference.uid)
        if len(archive) and space.reference.uid not in archive:
            raise UserError(
                f"run={folder}: the search space {space.name!r} is another than the one it was started with"
            )
        known = {trial.metrics["energy_j"].source for trial in archive if "energy_j" in trial.metrics}
        if known - {energy}:
            raise UserError(f"run={folder}: its energies are {' and '.join(sorted(known))}; here they would not be")
        for metric, model in _models(problem.target, energy).items():
            known = {trial.metrics[metric].model for trial in archive if metric in trial.metrics}
            if known - {model}:
                told = " and ".join(sorted(known))
                raise UserError(f"run={folder}: its {metric} was predicted by: {told}. Here it would be by: {model}")
        for draft in (folder / ARTIFACTS).glob(".*"):
            shutil.rmtree(draft)  # of a save that was killed
        trackers = [TRACKERS[name](run) for name in settings.trackers]

        def progress(detail: str, fraction: float) -> None:
            for tracker in trackers:
                tracker.progress("quality", detail, fraction)

        limits = settings.limits
        scoring = Scoring(
            problem,
            (
                Static(),
                *_run_stages(worker, place, settings, energy),
                Quality(worker, limits.quality_s, settings.quality, settings.corpus, cache_dir(), progress),
            ),
            lambda candidate: latency_key(candidate, problem),
            lambda candidate: quality_key(candidate, settings.quality, digest),
            proposer.predict if isinstance(proposer, SurrogateProposer) else lambda candidate: {},
            (lambda: proposer.considered) if isinstance(proposer, SurrogateProposer) else lambda: 0,
        )
        search(space.reference, scoring, proposer, archive, settings.budget, trackers)
        if place.attached:
            seconds = max(_CONFIRMING * settings.budget.seconds, _LEAST_CONFIRMING_S)
            confirm(_measure_again(problem, place, settings, energy), archive, seconds, trackers)
        front = archive.front()
        for index, trial in enumerate(front):
            for tracker in trackers:
                tracker.progress("artifacts", f"{trial.uid}, {index + 1} of {len(front)}", index / len(front))
            _write_artifact(run, settings, trial, worker)
        if front and place.attached and not (folder / COMPARISON).is_file():
            for tracker in trackers:
                tracker.progress("comparison", "side by side with the plain way", 0.0)
            _compare(run, archive, worker, limits)
        _tell_outcome(run, archive, trackers)
        archive.close()
    if not front:
        raise UserError(f"{folder}: no trial satisfies the constraints: {', '.join(map(str, problem.constraints))}")
    return run


def _models(target: Target, energy: Source | None) -> dict[str, str]:
    """What predicts here those metrics that would be measured if they could be: a front has those of one model."""
    latency = {} if target.attached else {"latency_s": absent.model(target)}
    return latency | ({"energy_j": power.model(latency.values())} if energy == "predicted" else {})


def _run_stages(
    worker: Worker, place: Workplace, settings: Settings, energy: Source | None, purpose: str = "search"
) -> tuple[Stage, ...]:
    """The stages that say how a candidate runs on its chip, or would."""
    limits = settings.limits
    compiled = Compile(worker, limits.compile_s, purpose)
    if not place.attached:
        return compiled, Verify(worker, limits.verify_s, portable=True), Predict(worker, limits.measure_s, energy)
    return (
        compiled,
        Verify(worker, limits.verify_s),
        Measure(worker, limits.measure_s, settings.measure_seconds, energy),
    )


def _measure_again(
    problem: Problem, place: Workplace, settings: Settings, energy: Source | None
) -> Callable[[Candidate], Metrics]:
    def measure(candidate: Candidate) -> Metrics:
        try:
            return once(candidate)
        except WorkerFailed:  # as any process may on a busy machine; this candidate ran before
            return once(candidate)

    def once(candidate: Candidate) -> Metrics:
        with place.worker() as fresh:
            stages = _run_stages(fresh, place, settings, energy, "confirm")
            return {name: metric for stage in stages for name, metric in stage(candidate, problem).items()}

    return measure


def _problem(settings: Settings, place: Workplace, worker: Worker) -> Problem:
    def measure_peaks() -> dict[str, Any]:
        return worker.call("peaks", {}, settings.limits.measure_s)

    target = place.target(cache_dir(), measure_peaks)
    return Problem(target, settings.workload, settings.objectives, settings.constraints)


def _proposer(settings: Settings, space: Space, problem: Problem) -> Proposer:
    return PROPOSERS[settings.proposer](Setting(space, problem, settings.seed, settings.proposer_options))


def _check_compiler_options(space: Space, worker: Worker, target: Target, settings: Settings) -> None:
    for options, why in check_options(worker, space, target, settings.limits).items():
        raise UserError(f"space {space.name}: knobs.schedule.compiler_options: {list(options)} is refused: {why}")


def _new_folder(output: Path, experiment: str) -> Path:
    try:
        output.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output).free
        if free < _LEAST_FREE_BYTES:
            raise UserError(
                f"output={output}: the disk has {free / 1e6:.0f} MB free; a run needs {_LEAST_FREE_BYTES / 1e6:.0f} MB"
            )
        base = output / experiment / time.strftime("%Y-%m-%d_%H-%M-%S")
        for attempt in range(100):
            folder = base if not attempt else base.with_name(f"{base.name}_{attempt}")
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                continue  # two runs in one second
    except OSError as error:
        raise UserError(f"output={output}: {error.strerror}") from None
    raise UserError(f"output={output}: a hundred runs already started in this second")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process works on a run; the lock goes with the process, however it ends."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"run={folder}: another process is working on this run") from None
        yield


def _write_artifact(run: Run, settings: Settings, trial: Trial, worker: Worker) -> None:
    folder = run.folder / ARTIFACTS / trial.uid
    if folder.is_dir():
        return
    arguments = {
        "point": trial.candidate.point,
        "workload": run.problem.workload.to_json(),
        "recipe": settings.quality.to_json(),
        "corpus": settings.corpus,
        "cache": str(cache_dir()),
        "manifest": {
            "experiment": run.experiment,
            "problem": run.problem.to_json(),
            "metrics": {name: metric.to_json() for name, metric in trial.metrics.items()},
        },
        "folder": str(folder),
        "absent": None if run.problem.target.attached else settings.target,
    }
    try:
        worker.call("artifact", arguments, settings.limits.artifact_s + settings.limits.quality_s)
    except Rejected as rejection:
        folder.parent.mkdir(exist_ok=True)
        write_text(run.folder / ARTIFACTS / f"{trial.uid}.failed", f"{rejection}\n")


def _compare(run: Run, archive: Archive, worker: Worker, limits: Limits) -> None:
    front = archive.front()
    best = min(trial.values["bits_per_byte"] for trial in front)
    near = [trial for trial in front if trial.values["bits_per_byte"] <= _NEAR_BEST * best]
    trial = min(near, key=lambda trial: trial.values["latency_s"])
    try:
        plain, samples = compare_with_plain(worker, trial.candidate, run.problem, limits)
    except Rejected as rejection:  # the plain form may not fit or not compile, or the machine be too busy
        write_text(run.folder / NO_COMPARISON, f"{rejection}\n")
        return
    (run.folder / NO_COMPARISON).unlink(missing_ok=True)
    ours, others = ([sides[side] for sides in samples] for side in (0, 1))
    fast, slow = workload_latency(ours, run.problem), workload_latency(others, run.problem)
    speedup, interval = timing.ratio_interval(fast.samples, slow.samples)
    comparison = Comparison(trial.uid, plain.uid, fast.value, slow.value, speedup, interval, fast.samples, slow.samples)
    write_json(run.folder / COMPARISON, asdict(comparison))


def _tell_outcome(run: Run, archive: Archive, trackers: list[Tracker]) -> None:
    folders = {trial.uid: run.folder / ARTIFACTS / trial.uid for trial in archive.front()}
    path = run.folder / COMPARISON
    comparison = None
    if path.is_file():
        data = json.loads(path.read_text())
        listed = {key: tuple(data[key]) for key in ("interval", "samples_s", "plain_samples_s")}
        comparison = Comparison(**{**data, **listed})
    failed, target = run.folder / NO_COMPARISON, run.problem.target
    why = failed.read_text().strip() if failed.is_file() else ""
    if not target.attached:
        why = f"{target.name} is not attached: nothing was run on it, and its figures are predicted, not confirmed"
    outcome = Outcome({uid: folder for uid, folder in folders.items() if folder.is_dir()}, comparison, why)
    pareto.write(run, archive, outcome)
    for tracker in trackers:
        tracker.finish(archive, outcome)
