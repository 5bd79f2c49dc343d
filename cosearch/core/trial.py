"""A trial: the record of what became of one candidate. Trials are only ever appended."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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

    `reused` names the metrics that were taken from earlier trials of equal key instead of being run again. Where it was
    measured once more (`Confirmation`), it is `confirmed`, `metrics` and `failure` are as they were found then, and
    `searched` has the metrics that the search had found of it. `considered` is how many candidates the proposer had
    scored by its models, and had not before, when it chose this one and those that it gave with it; they are counted in
    the first of them.
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
    confirmed: bool = False
    searched: Metrics = field(default_factory=dict)
    considered: int = 0

    @property
    def uid(self) -> str:
        return self.candidate.uid

    @property
    def values(self) -> dict[str, float]:
        """Metric to value."""
        return {name: metric.value for name, metric in self.metrics.items()}

    def confirmed_by(self, confirmation: "Confirmation") -> "Trial":
        """This trial with the figures of its confirmation."""
        return replace(
            self,
            confirmed=True,
            searched=self.metrics,
            metrics={**self.metrics, **confirmation.metrics},
            failure=confirmation.failure,
            seconds={**self.seconds, "confirm": confirmation.seconds},
        )

    def to_json(self) -> dict[str, Any]:
        """What the search found; a confirmation is stored beside it."""
        return {
            "point": self.candidate.point,
            "latency_key": self.latency_key,
            "quality_key": self.quality_key,
            "metrics": _to_json(self.metrics),
            "predictions": _to_json(self.predictions),
            "failure": self.failure and asdict(self.failure),
            "seconds": dict(self.seconds),
            "reused": list(self.reused),
            "fingerprint": dict(self.fingerprint),
            "considered": self.considered,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Trial":
        return cls(
            candidate=Candidate.from_point(data["point"]),
            latency_key=data["latency_key"],
            quality_key=data["quality_key"],
            metrics=_from_json(data["metrics"]),
            predictions=_from_json(data["predictions"]),
            failure=Failure(**data["failure"]) if data["failure"] else None,
            seconds=data["seconds"],
            reused=tuple(data["reused"]),
            fingerprint=data["fingerprint"],
            considered=int(data.get("considered", 0)),
        )


@dataclass(frozen=True)
class Confirmation:
    """What was measured of a trial once more, in a fresh process, or why it failed there; it took `seconds`."""

    uid: str
    metrics: Metrics
    failure: Failure | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "metrics": _to_json(self.metrics),
            "failure": self.failure and asdict(self.failure),
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, uid: str, data: Mapping[str, Any]) -> "Confirmation":
        failure = Failure(**data["failure"]) if data["failure"] else None
        return cls(uid, _from_json(data["metrics"]), failure, float(data["seconds"]))


def _to_json(metrics: Metrics) -> dict[str, Any]:
    return {name: metric.to_json() for name, metric in metrics.items()}


def _from_json(data: Mapping[str, Any]) -> Metrics:
    return {name: Metric.from_json(metric) for name, metric in data.items()}


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
