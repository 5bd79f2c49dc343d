"""A trial: the record of what became of one candidate. Trials are only ever appended."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cosearch.core.candidate import Candidate
from cosearch.core.metric import Metric, Metrics
from cosearch.core.problem import Problem


@dataclass(frozen=True)
class Failure:
    """Which stage refused a candidate, and why."""

    stage: str
    reason: str


@dataclass(frozen=True)
class Trial:
    """One candidate's metrics or failure, seconds by stage, and under what versions and chip it ran.

    `reused` names the metrics that were taken from earlier trials of equal key instead of being run again.
    """

    candidate: Candidate
    latency_key: str
    quality_key: str
    metrics: Metrics = field(default_factory=dict)
    predictions: Metrics = field(default_factory=dict)
    failure: Failure | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    reused: tuple[str, ...] = ()
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    @property
    def uid(self) -> str:
        return self.candidate.uid

    @property
    def values(self) -> dict[str, float]:
        """Metric to value."""
        return {name: metric.value for name, metric in self.metrics.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "point": self.candidate.point,
            "latency_key": self.latency_key,
            "quality_key": self.quality_key,
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
            "predictions": {name: metric.to_json() for name, metric in self.predictions.items()},
            "failure": {"stage": self.failure.stage, "reason": self.failure.reason} if self.failure else None,
            "seconds": dict(self.seconds),
            "reused": list(self.reused),
            "fingerprint": dict(self.fingerprint),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Trial":
        return cls(
            candidate=Candidate.from_point(data["point"]),
            latency_key=data["latency_key"],
            quality_key=data["quality_key"],
            metrics={name: Metric.from_json(metric) for name, metric in data["metrics"].items()},
            predictions={name: Metric.from_json(metric) for name, metric in data["predictions"].items()},
            failure=Failure(**data["failure"]) if data["failure"] else None,
            seconds=data["seconds"],
            reused=tuple(data["reused"]),
            fingerprint=data["fingerprint"],
        )


class Stage(Protocol):
    """Anything that scores a candidate. All candidates whose key `depends_on` ("latency_key" or "quality_key") is equal
    share the metrics that it `provides`."""

    @property
    def name(self) -> str: ...

    @property
    def depends_on(self) -> str: ...

    @property
    def provides(self) -> frozenset[str]: ...

    def __call__(self, candidate: Candidate, problem: Problem) -> Metrics:
        """Score `candidate`.

        Raises:
            Rejected: the candidate fails here; the reason is kept in its trial.
        """
        ...


class Proposer(Protocol):
    """A search method."""

    def ask(self, n: int) -> Sequence[Candidate]:
        """Up to `n` legal candidates; fewer or none where the method finds no new ones."""
        ...

    def tell(self, trials: Sequence[Trial]) -> None:
        """Learn from finished trials."""
        ...
