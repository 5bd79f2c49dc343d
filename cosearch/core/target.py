"""A target: the chip that a candidate is compiled for, and what it can do at best."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """What a chip can do at best. Peaks are upper limits: a datasheet's, or the best that was measured.

    `platform` is JAX's name for its kind of device. `peak_flops_per_s` is by the dtype of the operands.
    `cache_bytes` is what the last level of its caches holds: runs are timed on data that are not in there, so that they
    are read at `bandwidth_bytes_per_s` at most. `overhead_s` is what one operation costs at least, however small it is.
    `power_w` is the most that it is made to draw, None where nobody says. Of one that is not `attached` nothing can be
    measured here: models are compiled for it, and what they would cost is predicted.
    """

    name: str
    platform: str
    source: str
    peak_flops_per_s: Mapping[str, float]
    bandwidth_bytes_per_s: float
    capacity_bytes: int
    cores: int
    overhead_s: float
    cache_bytes: int = 0
    power_w: float | None = None
    attached: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Target":
        return cls(**data)
