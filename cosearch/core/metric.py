"""Metrics: the figures that stages produce, each with its unit and whether it was measured or predicted."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

Source = Literal["measured", "predicted"]

Z90 = NormalDist().inv_cdf(0.95)
"""How many standard deviations a 90 % interval reaches to either side."""

UNITS: dict[str, str] = {
    "latency_s": "s/token",
    "energy_j": "J/token",
    "memory_bytes": "bytes",
    "weight_bytes": "bytes",
    "cache_bytes": "bytes",
    "copied_bytes": "bytes",
    "parameters": "count",
    "bits_per_byte": "bits/byte",
    "recall_accuracy": "fraction",
    "numerical_error": "ratio",
    "portable_error": "ratio",
    "compile_s": "s",
}
"""Every metric that a stage may report, with its unit."""


@dataclass(frozen=True)
class Metric:
    """One figure.

    `interval` is the 90 % interval where one is known; `samples` are the raw values a measured figure was
    computed from, and `contended` the part of them that was taken while something else ran on the machine. `model` says
    what predicted a predicted one, and from which data.
    """

    value: float
    unit: str
    source: Source
    interval: tuple[float, float] | None = None
    samples: tuple[float, ...] = field(default=(), repr=False)
    contended: float = 0.0
    model: str = ""

    def to_json(self, with_samples: bool = True) -> dict[str, Any]:
        data: dict[str, Any] = {
            "value": self.value,
            "unit": self.unit,
            "source": self.source,
            "interval": self.interval,
        }
        if self.contended:
            data["contended"] = self.contended
        if self.model:
            data["model"] = self.model
        return data | {"samples": list(self.samples)} if with_samples else data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Metric":
        interval = data["interval"]
        return cls(
            value=float(data["value"]),
            unit=data["unit"],
            source=data["source"],
            interval=(float(interval[0]), float(interval[1])) if interval else None,
            samples=tuple(map(float, data.get("samples", ()))),
            contended=float(data.get("contended", 0.0)),
            model=str(data.get("model", "")),
        )


Metrics = Mapping[str, Metric]


def measured(name: str, value: float, **more: Any) -> Metric:
    """A measured figure of the metric `name`."""
    return Metric(float(value), UNITS[name], "measured", **more)


def predicted(name: str, value: float, interval: tuple[float, float], model: str = "") -> Metric:
    """A predicted figure of the metric `name` with its 90 % interval, and which model says so."""
    return Metric(float(value), UNITS[name], "predicted", interval, model=model)
