"""A workload: the operating points that a model is served at, with their weights."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

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
        points: Sequence[Mapping[str, Any]] = data.get("points") or ()
        if not points:
            raise UserError(f"{where}: 'points' is empty. A workload needs at least one operating point")
        return cls(str(data["name"]), tuple(_point(point, f"{where}.points[{i}]") for i, point in enumerate(points)))


def _point(data: Mapping[str, Any], where: str) -> OperatingPoint:
    if unknown := set(data) - {"phase", "batch", "context", "weight"}:
        raise UserError(f"{where}: unknown key {min(unknown)!r}. Allowed: phase, batch, context, weight")
    if data.get("phase") not in get_args(Phase):
        raise UserError(f"{where}.phase: {data.get('phase')!r} is unknown. Allowed: {', '.join(get_args(Phase))}")
    for key in ("batch", "context"):
        if not isinstance(data.get(key), int) or data[key] < 1:
            raise UserError(f"{where}.{key}: {data.get(key)!r} is not a whole number of at least 1")
    weight = data.get("weight", 1.0)
    if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise UserError(f"{where}.weight: {weight!r} is not a number above 0")
    return OperatingPoint(data["phase"], data["batch"], data["context"], float(weight))
