import json
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosearch.core.archive import SCHEMA, Archive
from cosearch.core.candidate import Candidate
from cosearch.core.errors import UserError
from cosearch.core.metric import measured
from cosearch.core.problem import Constraint, Objective, Problem
from cosearch.core.target import Target
from cosearch.core.trial import Confirmation, Failure, Trial
from cosearch.core.workload import OperatingPoint, Workload

CHECKOUT = Path(__file__).resolve().parents[2]

PROBLEM = Problem(
    Target("chip", "cpu", "made up", {"float32": 1e9}, 1e9, 10**9, 2, 1e-6),
    Workload("one", (OperatingPoint("decode", 1, 16),)),
    (Objective.parse("minimize latency_s"), Objective.parse("minimize memory_bytes")),
    (Constraint.parse("bits_per_byte <= 1.5 * reference"),),
)


def trial(number: int, latency: float | None = None, memory: float = 1.0, bits: float = 1.0, **more: Any) -> Trial:
    named = {"latency_s": latency, "memory_bytes": memory, "bits_per_byte": bits} if latency is not None else {}
    return Trial(
        **{
            "candidate": Candidate.from_point({"schedule.number": number}),
            "latency_key": f"latency {number}",
            "quality_key": "one quality",
            "metrics": {name: measured(name, value, samples=(value,)) for name, value in named.items()},
            "seconds": {"measure": 0.5},
        }
        | more
    )


REFERENCE = trial(0, 1.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trials.db"


def opened(path: Path) -> Archive:
    return Archive(path, PROBLEM, REFERENCE.uid)


@pytest.fixture
def archive(path: Path) -> Iterator[Archive]:
    archive = opened(path)
    yield archive
    archive.close()


def test_trials_come_back_whole_and_in_order(archive: Archive, path: Path):
    trials = [
        REFERENCE,
        trial(2, 0.5),
        trial(1, failure=Failure("compile", "no memory: é")),
        trial(3, 2.0, reused=("bits_per_byte",)),
    ]
    for one in trials:
        archive.append(one)
    again = opened(path)
    assert list(again) == list(archive) == trials
    assert len(again) == 4
    assert trial(2).uid in again
    assert "unknown" not in again
    assert again[trial(2).uid] == trials[1]
    assert again.seconds == pytest.approx(2.0)
    again.append(trial(4))
    again.close()
    reopened = opened(path)
    assert len(reopened) == 5
    reopened.close()


def test_a_uid_is_stored_once(archive: Archive, path: Path):
    archive.append(trial(1, 1.0))
    with pytest.raises(UserError, match=rf"trials\.db: trial {trial(1).uid} could not be stored: UNIQUE"):
        archive.append(trial(1, 2.0))
    assert archive[trial(1).uid].values["latency_s"] == 1.0
    archive.append(trial(2))
    again = opened(path)
    assert list(again) == list(archive)
    again.close()


def test_any_path_will_do(tmp_path: Path):
    path = tmp_path / "50% of #1? x=y é" / "trials.db"
    path.parent.mkdir()
    archive = opened(path)
    archive.append(REFERENCE)
    archive.close()
    assert path.is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.parent.name]


def confirmed(one: Trial, latency: float, **more: Any) -> Confirmation:
    metrics = {"latency_s": measured("latency_s", latency, samples=(latency, latency))}
    return replace(Confirmation(one.uid, metrics, None, 3.0), **more)


def test_a_confirmation_is_kept_beside_its_trial(archive: Archive, path: Path):
    for one in (REFERENCE, trial(1, 0.5), trial(2, 0.6)):
        archive.append(one)
    archive.confirm(confirmed(trial(1), 0.7))
    archive.confirm(confirmed(trial(2), 0.6, metrics={}, failure=Failure("confirm", "wrong result")))
    again = opened(path)
    for view in (archive, again):
        one, failed = view[trial(1).uid], view[trial(2).uid]
        assert (one.confirmed, one.values["latency_s"], one.values["memory_bytes"]) == (True, 0.7, 1.0)
        assert one.searched["latency_s"].samples == (0.5,) and one.metrics["latency_s"].samples == (0.7, 0.7)
        assert one.seconds == {"measure": 0.5, "confirm": 3.0}
        assert failed.failure == Failure("confirm", "wrong result") and failed.searched == failed.metrics
        assert not view[REFERENCE.uid].confirmed
    assert list(again) == list(archive)
    again.close()
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT trial FROM trials ORDER BY sequence").fetchall()
    connection.close()
    assert [Trial.from_json(json.loads(row)) for (row,) in rows] == [REFERENCE, trial(1, 0.5), trial(2, 0.6)]


def test_a_trial_is_confirmed_once(archive: Archive):
    archive.append(REFERENCE)
    archive.confirm(confirmed(REFERENCE, 1.1))
    with pytest.raises(UserError, match=rf"the confirmation of {REFERENCE.uid} could not be stored: UNIQUE"):
        archive.confirm(confirmed(REFERENCE, 1.2))
    assert archive.reference["latency_s"] == 1.1


def test_once_some_are_confirmed_the_front_is_of_those(archive: Archive):
    for one in (REFERENCE, trial(1, 0.5, 2.0), trial(2, 0.6, 1.5), trial(3, 0.9, 3.0)):
        archive.append(one)
    uids = [trial(1).uid, trial(2).uid, REFERENCE.uid]
    assert [one.uid for one in archive.front()] == [one.uid for one in archive.unconfirmed()] == uids
    archive.confirm(confirmed(trial(2), 0.95))
    assert [one.uid for one in archive.front()] == [trial(2).uid]
    assert [one.uid for one in archive.unconfirmed()] == [trial(1).uid, REFERENCE.uid]
    archive.confirm(confirmed(trial(1), 0.97))
    assert [one.uid for one in archive.settled()] == [trial(1).uid, trial(2).uid]
    assert len(archive.feasible()) == len(archive), "what was not confirmed breaks no constraint for that"
    assert [one.uid for one in archive.unconfirmed()] == [trial(3).uid, REFERENCE.uid], "that was behind a lucky one"


# Views


def test_before_the_reference_nothing_can_be_compared(archive: Archive):
    archive.append(trial(1, 0.5))
    assert archive.reference == {}
    assert archive.feasible() == archive.front() == archive.nearest(3) == []
    assert archive.hypervolume() == 0.0
    archive.append(REFERENCE)
    assert archive.reference == REFERENCE.values
    assert len(archive.feasible()) == 2


def test_a_failed_reference_leaves_nothing_to_compare_with(archive: Archive):
    archive.append(trial(0, failure=Failure("compile", "no")))
    archive.append(trial(1, 0.5))
    assert archive.feasible() == archive.front() == []
    assert archive.hypervolume() == 0.0


def test_front_holds_feasible_trials_that_no_other_dominates(archive: Archive):
    fast, small = trial(1, 0.5, 1.5), trial(2, 1.5, 0.5)
    dominated, same_as_fast = trial(3, 1.6, 1.6), trial(4, 0.5, 1.5)
    infeasible, failed = trial(5, 0.1, 0.1, bits=1.6), trial(6, 0.1, 0.1, failure=Failure("verify", "wrong numbers"))
    incomplete = trial(7)
    for one in (REFERENCE, small, fast, dominated, same_as_fast, infeasible, failed, incomplete):
        archive.append(one)
    assert archive.feasible() == [REFERENCE, small, fast, dominated, same_as_fast]
    assert archive.front() == [fast, REFERENCE, small]
    np.testing.assert_allclose(archive.losses([fast, small]), [[0.5, 1.5], [1.5, 0.5]])
    assert archive.losses([]).shape == (0, 2)
    # Below (2, 2): 1.5 x 0.5 of the fast one, 1 x 0.5 more of the reference, 0.5 x 0.5 more of the small one.
    assert archive.hypervolume() == pytest.approx(1.5)


def test_losses_are_relative_to_the_reference(archive: Archive):
    archive.append(trial(0, 4.0, 8.0))
    archive.append(trial(1, 2.0, 4.0))
    np.testing.assert_allclose(archive.losses(archive.front()), [[0.5, 0.5]])


def test_nearest_are_the_complete_trials_by_how_far_they_break_the_constraints(archive: Archive):
    far, near, unknown = trial(1, 1.0, bits=9.0), trial(2, 1.0, bits=1.6), trial(3)
    without_bits = trial(4, 1.0)
    without_bits = trial(4, metrics={name: without_bits.metrics[name] for name in ("latency_s", "memory_bytes")})
    for one in (without_bits, far, unknown, near, REFERENCE):
        archive.append(one)
    assert archive.nearest(9) == [REFERENCE, near, far, without_bits]
    assert archive.nearest(2) == [REFERENCE, near]


def test_shared_takes_exactly_the_metrics_that_were_asked_for(archive: Archive):
    archive.append(trial(1))
    archive.append(trial(2, 0.5, bits=1.25))
    archive.append(trial(3, 0.7, bits=1.75))
    found = archive.shared("quality_key", "one quality", frozenset({"bits_per_byte"}))
    assert found == {"bits_per_byte": measured("bits_per_byte", 1.25, samples=(1.25,))}
    assert archive.shared("quality_key", "another", frozenset({"bits_per_byte"})) is None
    assert archive.shared("quality_key", "one quality", frozenset({"bits_per_byte", "compile_s"})) is None
    assert archive.shared("latency_key", "latency 1", frozenset({"latency_s"})) is None


# Damage


def corrupt(path: Path, what: str) -> None:
    if what == "text":
        path.write_text("this is no database\n" * 100)
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif what == "overwritten":
        content = bytearray(path.read_bytes())
        content[4096:12288] = b"\xa5" * 8192
        path.write_bytes(bytes(content))
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE trials SET trial = ?", (what,))
        connection.close()


@pytest.mark.parametrize("what", ["text", "truncated", "overwritten", "{", "{}", "3", "null"])
def test_a_damaged_archive_is_refused_by_name(archive: Archive, path: Path, what: str):
    for number in range(60):
        archive.append(trial(number, 1.0))
    archive.close()
    corrupt(path, what)
    with pytest.raises(UserError, match=r"trials\.db: damaged archive: "):
        opened(path)


@pytest.mark.parametrize("version", [0, SCHEMA + 1])
def test_an_archive_of_another_version_is_refused_and_left_alone(archive: Archive, path: Path, version: int):
    archive.append(REFERENCE)
    archive.close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"archive of version {version}; this cosearch reads version {SCHEMA}"):
        opened(path)
    assert path.read_bytes() == before


def test_an_archive_in_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="unable to open"):
        opened(tmp_path / "missing" / "trials.db")


def test_a_write_that_fails_leaves_the_archive_as_it_was(archive: Archive, path: Path):
    archive.append(REFERENCE)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TRIGGER full BEFORE INSERT ON trials BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    with pytest.raises(UserError, match="could not be stored: disk is full"):
        archive.append(trial(1))
    assert list(archive) == [REFERENCE]
    connection.execute("DROP TRIGGER full")
    connection.close()
    archive.append(trial(1))
    assert len(archive) == 2


WRITER = """
import sys
from pathlib import Path
from cosearch.core.archive import Archive
from cosearch.core.candidate import Candidate
from cosearch.core.trial import Trial

archive = Archive(Path(sys.argv[1]), None, "")
number = len(archive)
while True:
    candidate = Candidate.from_point({"schedule.number": number})
    trial = Trial(candidate, "l", "q", fingerprint={"padding": "x" * (number * 997 % 9000)})
    archive.append(trial)
    print(trial.uid, flush=True)
    number += 1
"""


def test_a_killed_writer_loses_no_trial_that_was_acknowledged(path: Path):
    rng = random.Random(5)
    acknowledged: list[str] = []
    for _ in range(5):
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(rng.randint(1, 40)):
                acknowledged.append(writer.stdout.readline().strip())
            time.sleep(rng.uniform(0, 0.01))  # into the middle of some later write
            writer.kill()
            acknowledged += [line.strip() for line in writer.stdout if line.endswith("\n")]
        archive = opened(path)
        assert "" not in acknowledged
        stored = [one.uid for one in archive]
        assert stored[: len(acknowledged)] == acknowledged
        # At most the trial that was being written when the kill came is there without an acknowledgement.
        assert len(stored) <= len(acknowledged) + 1
        acknowledged = stored
        archive.close()
