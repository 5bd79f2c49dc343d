"""Calibrating a chip at hand, and telling on the console what was measured and how well the rest is predicted."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cosearch.core.errors import Rejected, UserError
from cosearch.core.metric import Z90
from cosearch.core.target import Target
from cosearch.latency.calibration import DRIFT, Calibration, Shot, Subject, choose, path_of, stored, subjects
from cosearch.latency.tables import Operations
from cosearch.measure.fingerprint import fingerprint
from cosearch.measure.process import Worker
from cosearch.paths import cache_dir
from cosearch.targets.workplace import Workplace

_CHECKS = 5
_SECONDS, _LIMIT_S, _PEAKS_S = 0.3, 120.0, 120.0
_SOFTWARE = ("jax", "jaxlib", "python", "processor", "compiler", "system", "threads")


def calibrate(name: str, shots: int, seed: int) -> None:
    """Measure the `shots` operations of each kind that tell most of a chip at hand, and some to check by; keep them.

    Raises:
        UserError: the chip is not attached, or none of its operations can be measured.
    """
    console, software = Console(), {key: fingerprint().get(key) for key in _SOFTWARE}
    with _at_work(name) as (target, measure, progress):
        measured: dict[bool, list[Shot]] = {True: [], False: []}
        refused: list[str] = []
        known = subjects(target)
        planned = [(subject, *choose(subject, shots, _CHECKS, seed)) for subject in known]
        task = progress.add_task("measuring", total=sum(len(one) + len(other) for _, one, other in planned))
        for subject, chosen, checks in planned:
            for own, operations in ((True, chosen), (False, checks)):
                for columns in _rows(operations):
                    progress.update(task, description=_told(subject.kind, columns))
                    try:
                        measured[own].append(measure(subject.kind, columns))
                    except Rejected as rejection:
                        refused.append(str(rejection))
                    progress.advance(task)
        if not measured[True]:
            raise UserError(f"target={name}: none of its operations could be measured: {refused[0] if refused else ''}")
    calibration = Calibration(name, software, tuple(measured[True]), tuple(measured[False]))
    calibration.save(path_of(name))
    console.print(_table(known, calibration))
    disturbed = sum(one.contended > 0 for one in (*calibration.shots, *calibration.checks))
    if disturbed:
        console.print(f"{disturbed} were measured while something else ran: measure again on an idle machine")
    for why in refused:
        console.print(f"refused: {why}", style="dim", highlight=False)
    console.print(f"saved to {path_of(name)}", highlight=False)


def check_drift(name: str, count: int) -> bool:
    """Measure `count` operations of the calibration again, of each kind in turn, and tell whether it still holds.

    Raises:
        UserError: the chip is not attached, or there is no calibration of it.
    """
    calibration, console = stored(name), Console()
    if calibration is None:
        raise UserError(f"target={name}: has no calibration; make one: python -m cosearch calibrate target={name}")
    table, drifted = Table("operation", "then", "now", "now / then", "measured"), []
    with _at_work(name) as (_, measure, progress):
        for shot in progress.track(in_turn(calibration.shots)[:count], description="measuring again"):
            row = (_told(shot.kind, shot.columns), _us(shot.latency_s))
            try:
                now = measure(shot.kind, shot.columns).latency_s
            except Rejected as rejection:
                drifted.append(True)
                table.add_row(*row, "", "", f"refused: {rejection}")
                continue
            ratio = now / shot.latency_s
            drifted.append(abs(np.log(ratio)) > np.log1p(DRIFT))
            table.add_row(*row, _us(now), f"{ratio:.2f}", "drifted" if drifted[-1] else "holds")
    console.print(table)
    now = fingerprint()
    for key, then in calibration.software.items():
        if now.get(key) != then:
            console.print(f"{key} was {then!r} and is {now.get(key)!r}", highlight=False)
    holds = sum(drifted) <= len(drifted) / 2
    verdict = "still holds" if holds else f"no longer holds: python -m cosearch calibrate target={name}"
    console.print(
        f"{sum(drifted)} of {len(drifted)} differ by more than {DRIFT:.0%} or are refused; the calibration {verdict}"
    )
    return holds


def in_turn(shots: Sequence[Shot]) -> list[Shot]:
    """The first of each kind, then the second of each, and so on."""
    kinds = {one.kind: [other for other in shots if other.kind == one.kind] for one in shots}
    return [one for each in itertools.zip_longest(*kinds.values()) for one in each if one is not None]


@contextmanager
def _at_work(name: str) -> Iterator[tuple[Target, Callable[[str, Mapping[str, Any]], Shot], Progress]]:
    """The chip, a way to measure its operations, and progress that is shown."""
    place = Workplace.of(name)
    if not place.attached:
        raise UserError(f"target={name}: is not attached to this machine, so that nothing of it can be measured here")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with place.worker() as worker, Progress(*columns, transient=True) as progress:
        target = place.target(cache_dir(), lambda: worker.call("peaks", {}, _PEAKS_S))
        yield target, lambda kind, sizes: _measured(worker, target, kind, sizes), progress


def _measured(worker: Worker, target: Target, kind: str, columns: Mapping[str, Any]) -> Shot:
    arguments = {"kind": kind, "columns": dict(columns), "seconds": _SECONDS, "cold_bytes": 2 * target.cache_bytes}
    reply = worker.call("operation", arguments, _LIMIT_S)
    samples = [float(f"{one:.5g}") for one in reply["samples_s"]]
    return Shot(kind, columns, float(np.median(reply["samples_s"])), samples, reply["contended"])


def _rows(operations: Operations) -> Iterator[dict[str, Any]]:
    for row in range(len(operations)):
        yield {name: values[row].item() for name, values in operations.columns.items()}


def _told(kind: str, columns: Any) -> str:
    return f"{kind} {' '.join(map(str, columns.values()))}"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs"


def _table(known: list[Subject], calibration: Calibration) -> Table:
    """Each operation as it was measured, and what was predicted of it before and, of checks, after the shots."""
    table = Table("operation", "measured", "predicted before", "predicted after", "in 90 % interval")
    for subject in known:
        for shots, after in ((calibration.shots, False), (calibration.checks, True)):
            own = [one for one in shots if one.kind == subject.kind]
            if not own:
                continue
            names = own[0].columns
            operations = Operations(
                subject.kind, {name: np.array([one.columns[name] for one in own]) for name in names}
            )
            first, second = (_predicted(subject, one, operations) for one in (None, calibration))
            for place, shot in enumerate(own):
                inside = abs(np.log(shot.latency_s) - second[0][place]) <= Z90 * second[1][place]
                last = (_us(np.exp(second[0][place])), "yes" if inside else "no") if after else ("(shot)", "")
                table.add_row(_told(shot.kind, shot.columns), _us(shot.latency_s), _us(np.exp(first[0][place])), *last)
        table.add_section()
    names = {one.kind: ", ".join(one.columns) for one in (*calibration.shots, *calibration.checks)}
    table.caption = "\n".join(f"{kind}: {told}" for kind, told in names.items())
    return table


def _predicted(subject: Subject, calibration: Calibration | None, operations: Operations) -> tuple[Any, Any]:
    posterior, rows = subject.adapted(calibration, operations)
    return posterior.predict(rows)
