"""A small run with real trials in a real archive."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cosearch.core.archive import Archive
from cosearch.core.trial import Trial
from cosearch.report import Comparison, Outcome, Run
from tests.report.samples import KNEE, TRIALS, make_run

Fill = Callable[..., Archive]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = tmp_path / "2026-01-01"
    folder.mkdir()
    return make_run(folder)


@pytest.fixture
def fill() -> Iterator[Fill]:
    """Opens the archive of a run and puts trials into it."""
    opened: list[Archive] = []

    def open_and_fill(run: Run, trials: tuple[Trial, ...] = TRIALS) -> Archive:
        archive = Archive(run.folder / "trials.db", run.problem, run.space.reference.uid)
        opened.append(archive)
        for trial in trials:
            archive.append(trial)
        return archive

    yield open_and_fill
    for archive in opened:
        archive.close()


@pytest.fixture
def archive(run: Run, fill: Fill) -> Archive:
    return fill(run)


@pytest.fixture
def outcome(run: Run) -> Outcome:
    folder = run.folder / "artifacts" / KNEE.uid
    folder.mkdir(parents=True)
    comparison = Comparison(
        KNEE.uid, "0" * 16, 4e-4, 7.6e-4, 1.9, (1.8, 2.0), samples_s=(4e-4,) * 30, plain_samples_s=(7.6e-4,) * 30
    )
    return Outcome({KNEE.uid: folder}, comparison)
