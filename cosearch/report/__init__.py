"""What the user sees of a run: one `Tracker` per file, told of everything as it happens.

To add one, write `<name>.py` here (or in a package of your own, by an entry point in the group
`cosearch.tracker`) and register a callable that takes a `Run`; `cosearch.testing.check_tracker` then tests it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cosearch.core.archive import Archive
from cosearch.core.problem import Problem
from cosearch.core.registry import Registry
from cosearch.core.space import Space
from cosearch.core.trial import Trial
from cosearch.measure.timing import Verdict, compare


@dataclass(frozen=True)
class Budget:
    """A search ends when it has so many trials, or has spent so many seconds on them, whichever is first."""

    trials: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """A run's folder and what it is about."""

    folder: Path
    experiment: str
    problem: Problem
    space: Space
    budget: Budget


@dataclass(frozen=True)
class Comparison:
    """Two compilations of one architecture, measured side by side in random order.

    `uid` is a point of the front, `plain` the same architecture compiled the plain way. `speedup` is the ratio
    of the median latencies, with a 90 % bootstrap interval.
    """

    uid: str
    plain_uid: str
    latency_s: float
    plain_latency_s: float
    speedup: float
    interval: tuple[float, float]
    samples_s: tuple[float, ...]
    plain_samples_s: tuple[float, ...]

    @property
    def verdict(self) -> Verdict:
        """Whether the point of the front is faster."""
        return compare(self.samples_s, self.plain_samples_s)


@dataclass(frozen=True)
class Outcome:
    """What a finished search leaves: a folder for each point of the front, and the speed-up it was after, or why that
    could not be measured."""

    artifacts: Mapping[str, Path] = field(default_factory=dict)
    comparison: Comparison | None = None
    why_no_comparison: str = ""


class Tracker(Protocol):
    """Somebody who watches a run. A tracker never stops or slows the search, whatever happens to it."""

    def start(self, archive: Archive) -> None:
        """The run begins or is resumed; `archive` holds what it has so far."""
        ...

    def progress(self, stage: str, detail: str, fraction: float) -> None:
        """A stage is at work; `fraction` of it is done."""
        ...

    def log(self, trial: Trial, archive: Archive) -> None:
        """A trial is finished and in the archive."""
        ...

    def finish(self, archive: Archive, outcome: Outcome) -> None:
        """The search has ended, and its artifacts are written."""
        ...


TRACKERS: Registry[Callable[[Run], Tracker]] = Registry("tracker", __name__)
