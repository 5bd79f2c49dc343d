"""`pareto.json`: what a run found, for programs. Its keys are a contract; a change of them changes `VERSION`."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cosearch.core import pareto
from cosearch.core.archive import Archive
from cosearch.core.files import write_json
from cosearch.core.metric import UNITS, Metrics
from cosearch.core.trial import Trial
from cosearch.report import Comparison, Outcome, Run

VERSION = 2
PREDICTED = ("latency_s", "bits_per_byte")
"""The metrics for which there are predictors, whose errors are reported."""


def document(run: Run, archive: Archive, outcome: Outcome) -> dict[str, Any]:
    """The front and all that is needed to judge it, as plain JSON data.

    Figures of a point are its trial's metrics, measured once more where it is "confirmed"; "searched" then has those
    that the search had found.
    """
    front = archive.front()
    best = knee(archive, front)
    return {
        "version": VERSION,
        "experiment": run.experiment,
        "problem": run.problem.to_json(),
        "objectives": [
            {"name": objective.metric, "unit": UNITS[objective.metric], "goal": objective.goal}
            for objective in run.problem.objectives
        ],
        "hypervolume": archive.hypervolume(),
        "reference": {
            "uid": archive.reference_uid,
            "metrics": _figures(archive[archive.reference_uid].metrics) if archive.reference else {},
        },
        "trials": {"total": len(archive), "failed": failed(archive), **effort(archive)},
        "knee": best and best.uid,
        "points": [_point(run, trial, outcome) for trial in front],
        "comparison": outcome.comparison and _comparison(outcome.comparison),
        "prediction_error": {name: _prediction_error(archive, name) for name in PREDICTED},
    }


def write(run: Run, archive: Archive, outcome: Outcome) -> None:
    """Write `pareto.json` into the run's folder."""
    write_json(run.folder / "pareto.json", document(run, archive, outcome))


def knee(archive: Archive, front: Sequence[Trial]) -> Trial | None:
    """The point of the front that trades best, or None where the front is empty."""
    return front[pareto.knee(archive.losses(list(front)))] if front else None


def failed(archive: Archive) -> int:
    """How many trials ended in a failure."""
    return sum(trial.failure is not None for trial in archive)


def effort(archive: Archive) -> dict[str, int]:
    """How many candidates were considered, by the proposer's models or by being tried, and how many of them were
    compiled and measured."""
    done = {stage: sum(stage in trial.seconds for trial in archive) for stage in ("compile", "measure")}
    considered = max(sum(trial.considered for trial in archive), len(archive))
    return {"considered": considered, "compiled": done["compile"], "measured": done["measure"]}


def predicted_and_measured(archive: Archive, name: str) -> list[Trial]:
    """The trials whose metric `name` was first predicted and then measured anew."""
    return [
        trial
        for trial in archive
        if name in trial.predictions
        and name in trial.metrics
        and trial.metrics[name].source == "measured"
        # A reused figure would count one measurement many times.
        and name not in trial.reused
    ]


def _point(run: Run, trial: Trial, outcome: Outcome) -> dict[str, Any]:
    folder = outcome.artifacts.get(trial.uid)
    return {
        "uid": trial.uid,
        "candidate": _plain(trial.candidate.point),
        "metrics": _figures(trial.metrics),
        "confirmed": trial.confirmed,
        "searched": _figures(trial.searched),
        "artifact": folder and os.path.relpath(folder, run.folder),
    }


def _figures(metrics: Metrics) -> dict[str, Any]:
    return {name: _plain(metric.to_json(with_samples=False)) for name, metric in metrics.items()}


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return _plain(asdict(comparison))


def _prediction_error(archive: Archive, name: str) -> dict[str, Any] | None:
    """The mean absolute error relative to what was measured, and how often the interval held it."""
    pairs = [(t.predictions[name], t.metrics[name].value) for t in predicted_and_measured(archive, name)]
    pairs = [(prediction, value) for prediction, value in pairs if value]
    if not pairs:
        return None
    inside = [p.interval[0] <= value <= p.interval[1] for p, value in pairs if p.interval]
    return {
        "count": len(pairs),
        "mape": float(np.mean([abs(prediction.value - value) / abs(value) for prediction, value in pairs])),
        "coverage": float(np.mean(inside)) if inside else None,
    }


def _plain(data: Any) -> Any:
    """`data` with lists for tuples, as it is when read back."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    return [_plain(value) for value in data] if isinstance(data, list | tuple) else data
