"""A workload: the operating points that a model is served at, with their weights."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from cosearch.core import check
from cosearch.core.errors import UserError

Phase = Literal["decode", "prefill"]


@dataclass(frozen=True)
class OperatingPoint:
    """`decode`: one token for each of `batch` sequences, with `context` tokens in the cache.
    `prefill`: `context` tokens of each sequence at once, into an empty cache."""

    phase: Phase
    batch: int
    context: int
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens that one run of this operating point processes."""
        return self.batch * (self.context if self.phase == "prefill" else 1)


@dataclass(frozen=True)
class Workload:
    """Weighted operating points. `latency_s` of a workload is the weighted mean over its points of the
    seconds that one run takes for one sequence and token."""

    name: str
    points: tuple[OperatingPoint, ...]

    @property
    def context(self) -> int:
        """Tokens that the cache must hold for each sequence."""
        return max(point.context for point in self.points)

    @property
    def batch(self) -> int:
        """The most sequences that are served at once."""
        return max(point.batch for point in self.points)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "points": [asdict(point) for point in self.points]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "workload") -> "Workload":
        """Read plain data.

        Raises:
            UserError: a key is missing or unknown, or a value is out of range.
        """
        if unknown := sorted(set(map(str, data)) - {"name", "points"}):
            raise UserError(f"{where}: unknown key {unknown[0]!r}. Allowed: name, points")
        if not isinstance(data.get("name"), str):
            raise UserError(f"{where}.name: {data.get('name')!r} is not a name")
        points = data.get("points") or ()
        if not isinstance(points, Sequence) or isinstance(points, str):
            raise UserError(f"{where}.points: {points!r} is not a list of operating points")
        if not points:
            raise UserError(f"{where}: 'points' is empty. A workload needs at least one operating point")
        return cls(data["name"], tuple(_point(point, f"{where}.points[{i}]") for i, point in enumerate(points)))


def _point(data: Any, where: str) -> OperatingPoint:
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: {data!r} is not a mapping of phase, batch, context and weight")
    if unknown := sorted(set(map(str, data)) - {"phase", "batch", "context", "weight"}):
        raise UserError(f"{where}: unknown key {unknown[0]!r}. Allowed: phase, batch, context, weight")
    if data.get("phase") not in get_args(Phase):
        raise UserError(f"{where}.phase: {data.get('phase')!r} is unknown. Allowed: {', '.join(get_args(Phase))}")
    for key in ("batch", "context"):
        check.whole(data.get(key), 1, f"{where}.{key}")
    weight = data.get("weight", 1.0)
    check.positive(weight, f"{where}.weight")
    return OperatingPoint(data["phase"], data["batch"], data["context"], float(weight))
