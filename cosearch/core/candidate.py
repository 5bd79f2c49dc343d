"""A candidate: one point of the search, with its four axes and the keys by which results are shared."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

AXES = ("architecture", "precision", "sparsity", "schedule")

Value = bool | int | float | str | tuple["Value", ...]
Point = Mapping[str, Value]
"""Knob (`axis.name`) to value."""


def canonical_json(data: Any) -> str:
    """The one JSON text of `data`: sorted keys, no spaces, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(data: Any) -> str:
    """16 hexadecimal digits that name `data`, any JSON value."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()[:16]


def as_value(data: Any) -> Value:
    """A knob's value from plain JSON or YAML data: lists become tuples, and 1.0 is 1, as it has one uid."""
    if isinstance(data, list | tuple):
        return tuple(as_value(item) for item in data)
    return int(data) if isinstance(data, float) and data.is_integer() else data


class Choices(Mapping[str, Value]):
    """What one axis chose: a frozen, hashable mapping from a knob's name (without its axis) to its value."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {name: as_value(values[name]) for name in sorted(values)}

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return f"Choices({self._values})"


@dataclass(frozen=True)
class Candidate:
    """One point: how the model is built, stored, thinned out and run."""

    architecture: Choices
    precision: Choices
    sparsity: Choices
    schedule: Choices
    _keys: dict[tuple[str, ...], str] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_point(cls, point: Point) -> "Candidate":
        """The candidate of a canonical point (`Space.canonical`)."""
        axes: dict[str, dict[str, Value]] = {axis: {} for axis in AXES}
        for knob, value in point.items():
            axis, _, name = knob.partition(".")
            axes[axis][name] = value
        return cls(**{axis: Choices(values) for axis, values in axes.items()})

    @property
    def point(self) -> dict[str, Value]:
        """Dotted knobs, in the order of the axes."""
        return {f"{axis}.{name}": value for axis in AXES for name, value in getattr(self, axis).items()}

    @cached_property
    def uid(self) -> str:
        """Names this candidate everywhere; the hash of its canonical JSON."""
        return content_hash(self.point)

    def key(self, *axes: str) -> str:
        """The hash of some axes only, by which trials that agree in them share results."""
        if axes not in self._keys:  # proposers ask for those of thousands, again and again
            self._keys[axes] = content_hash({axis: dict(getattr(self, axis)) for axis in axes})
        return self._keys[axes]

    @property
    def quality_axes_key(self) -> str:
        """What quality depends on: the schedule changes no result."""
        return self.key("architecture", "precision", "sparsity")

    def differing_axes(self, other: "Candidate") -> tuple[str, ...]:
        """The axes in which two candidates differ."""
        return tuple(axis for axis in AXES if getattr(self, axis) != getattr(other, axis))
