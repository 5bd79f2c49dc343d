"""The archive: every trial of a run, durable in SQLite; front, hypervolume, caches and resume are views of it.

A trial is acknowledged once `append` returns: it is then on the disk (WAL with `synchronous=FULL`), and a
kill at any moment loses at most the trial that was running.
"""

import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sqlalchemy import URL, Integer, String, create_engine, event, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from cosearch.core import pareto
from cosearch.core.candidate import canonical_json
from cosearch.core.errors import UserError
from cosearch.core.metric import Metrics
from cosearch.core.problem import Problem
from cosearch.core.trial import Confirmation, Trial

SCHEMA = 1
"""The version of the table and of a trial's JSON; a run folder of another is refused, never guessed at."""


class _Base(DeclarativeBase):
    pass


class _Row(_Base):
    __tablename__ = "trials"
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    uid: Mapped[str] = mapped_column(String, unique=True)
    latency_key: Mapped[str] = mapped_column(String, index=True)
    quality_key: Mapped[str] = mapped_column(String, index=True)
    failed_stage: Mapped[str | None] = mapped_column(String)
    finished_at: Mapped[str] = mapped_column(String)
    trial: Mapped[str] = mapped_column(String)


class _Confirmed(_Base):
    __tablename__ = "confirmations"
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    uid: Mapped[str] = mapped_column(String, unique=True)
    finished_at: Mapped[str] = mapped_column(String)
    confirmation: Mapped[str] = mapped_column(String)


class Archive:
    """The trials of one run on one problem, in the order in which they finished, as they were confirmed where they
    were; the front is then of confirmed trials only."""

    def __init__(self, path: Path, problem: Problem, reference_uid: str) -> None:
        """Open or create the archive at `path`.

        Raises:
            UserError: the file is damaged or of another version.
        """
        self.problem = problem
        self.reference_uid = reference_uid
        self._path = path
        self._engine = create_engine(URL.create("sqlite", database=str(path)))
        event.listen(self._engine, "connect", _make_durable)
        try:
            with self._engine.begin() as connection:
                version = connection.exec_driver_sql("PRAGMA user_version").scalar()
                rows = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar()
                if rows and version != SCHEMA:
                    raise UserError(f"{path}: archive of version {version}; this cosearch reads version {SCHEMA}")
                _Base.metadata.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA}")
            with Session(self._engine) as session:
                rows = session.scalars(select(_Row).order_by(_Row.sequence)).all()
                self._trials = {row.uid: Trial.from_json(json.loads(row.trial)) for row in rows}
                for row in session.scalars(select(_Confirmed).order_by(_Confirmed.sequence)):
                    self._confirm(Confirmation.from_json(row.uid, json.loads(row.confirmation)))
        except (DatabaseError, ValueError, KeyError, TypeError) as error:
            self.close()
            why = error.orig if isinstance(error, DatabaseError) else error
            raise UserError(f"{path}: damaged archive: {why}") from None
        except UserError:
            self.close()
            raise

    def append(self, trial: Trial) -> None:
        """Store a finished trial for good.

        Raises:
            UserError: the disk is full or refuses the write; the archive stays as it was.
        """
        row = _Row(
            uid=trial.uid,
            latency_key=trial.latency_key,
            quality_key=trial.quality_key,
            failed_stage=trial.failure and trial.failure.stage,
            finished_at=_now(),
            trial=canonical_json(trial.to_json()),
        )
        self._store(row, f"trial {trial.uid}")
        self._trials[trial.uid] = trial

    def confirm(self, confirmation: Confirmation) -> None:
        """Store what was measured of a trial once more, for good; the trial's own row stays as it is.

        Raises:
            UserError: the disk is full or refuses the write; the archive stays as it was.
        """
        data = canonical_json(confirmation.to_json())
        row = _Confirmed(uid=confirmation.uid, finished_at=_now(), confirmation=data)
        self._store(row, f"the confirmation of {confirmation.uid}")
        self._confirm(confirmation)

    def _confirm(self, confirmation: Confirmation) -> None:
        self._trials[confirmation.uid] = self._trials[confirmation.uid].confirmed_by(confirmation)

    def _store(self, row: _Base, what: str) -> None:
        try:
            with Session(self._engine) as session, session.begin():
                session.add(row)
        except DatabaseError as error:
            raise UserError(f"{self._path}: {what} could not be stored: {error.orig}") from None

    def __len__(self) -> int:
        return len(self._trials)

    def __iter__(self) -> Iterator[Trial]:
        return iter(self._trials.values())

    def __contains__(self, uid: object) -> bool:
        return uid in self._trials

    def __getitem__(self, uid: str) -> Trial:
        return self._trials[uid]

    @property
    def seconds(self) -> float:
        """What all trials took together."""
        return sum(sum(trial.seconds.values()) for trial in self)

    @property
    def reference(self) -> dict[str, float]:
        """The metrics of the reference trial; empty before it has run."""
        return self._trials[self.reference_uid].values if self.reference_uid in self._trials else {}

    def shared(self, key: str, value: str, stage_metrics: frozenset[str]) -> Metrics | None:
        """`stage_metrics` of an earlier trial whose `key` has this value, if there is one."""
        for trial in self:
            if getattr(trial, key) == value and stage_metrics <= trial.metrics.keys():
                return {name: trial.metrics[name] for name in stage_metrics}
        return None

    def feasible(self) -> list[Trial]:
        """The trials that have every objective and break no constraint."""
        return self._feasible(list(self))

    def settled(self) -> list[Trial]:
        """The feasible trials whose figures count for the front: confirmed ones only, where there are any."""
        return self._feasible([trial for trial in self if trial.confirmed] or list(self))

    def unconfirmed(self) -> list[Trial]:
        """The trials that would be on the front if their figures were confirmed, by the first objective."""
        return [trial for trial in self._front(self.feasible()) if not trial.confirmed]

    def _feasible(self, trials: list[Trial]) -> list[Trial]:
        reference = self.reference
        return [
            trial
            for trial in trials
            if trial.failure is None
            and self.problem.losses(trial.values, reference) is not None
            and self.problem.excess(trial.values, reference) == 0
        ]

    def losses(self, trials: list[Trial]) -> np.ndarray:
        """The losses [trials, objectives] of complete trials, relative to the reference."""
        rows = [self.problem.losses(trial.values, self.reference) for trial in trials]
        return np.array(rows, dtype=float).reshape(len(trials), len(self.problem.objectives))

    def front(self) -> list[Trial]:
        """The settled trials that no other dominates, by the first objective."""
        return self._front(self.settled())

    def _front(self, trials: list[Trial]) -> list[Trial]:
        return [trials[index] for index in pareto.front(self.losses(trials))]

    def hypervolume(self) -> float:
        """Of the front, in losses relative to the reference (`LOSS_LIMIT` in every objective)."""
        return pareto.hypervolume(self.losses(self.front())) if self.reference else 0.0

    def nearest(self, count: int) -> list[Trial]:
        """The complete trials that come nearest to the constraints, for a search that satisfied none."""
        complete = [trial for trial in self if self.problem.losses(trial.values, self.reference) is not None]
        return sorted(complete, key=lambda trial: self.problem.excess(trial.values, self.reference))[:count]

    def close(self) -> None:
        """Give the file back."""
        self._engine.dispose()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _make_durable(connection: sqlite3.Connection, _: object) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA busy_timeout = 10000")
