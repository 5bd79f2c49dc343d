"""Axis *precision*: in which number formats weights, activations and the KV cache are stored, one file each.

A format packs matrices on the host in numpy, so that packing is the same everywhere, and computes with the
packed arrays in JAX. To add one, write `<name>.py` here (or in a package of your own, by an entry point in the
group `cosearch.format`) and register a `Format`; `cosearch.testing.check_format` then tests it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from cosearch.core.candidate import Choices
from cosearch.core.registry import Registry
from cosearch.core.space import Knob, choice

Stored = Mapping[str, Any]
"""The arrays of one packed tensor, by part: always "values", and what the format needs beside them."""


class Format(Protocol):
    """A number format. Matrices are logically [in, out]; `layout` is the order in memory, "in_out" or "out_in"."""

    weights: bool
    """Whether it can hold weights."""
    cache: bool
    """Whether it can hold a KV cache."""
    activations: bool
    """Whether a model can compute in it; then its name is a dtype's."""
    relative_error: float
    """The largest error of a weight that `pack` makes, relative to the largest weight of its output channel."""

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Stored bits a weight of a matrix [rows in, columns out], scales included."""
        ...

    def spec(self, rows: int, columns: int, layout: str) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a packed matrix."""
        ...

    def pack(self, weights: np.ndarray, layout: str) -> dict[str, np.ndarray]:
        """Pack a float32 matrix [in, out].

        Raises:
            Rejected: the matrix holds values that the format has no place for (NaN, infinities).
        """
        ...

    def unpack(self, stored: Stored, layout: str) -> np.ndarray:
        """The matrix [in, out] in float64 that the packed arrays stand for."""
        ...

    def matmul(self, x: jax.Array, stored: Stored, layout: str, lowering: str) -> jax.Array:
        """`x` [..., in] times the matrix, [..., out], accumulated in at least float32, in the dtype of `x`."""
        ...

    def columns(self, stored: Stored, indices: jax.Array, layout: str, dtype: Any) -> jax.Array:
        """The columns [..., in] of the matrix at `indices` [...], in `dtype`."""
        ...

    def encode(self, x: jax.Array) -> dict[str, jax.Array]:
        """Pack a tensor [..., D] of keys or values; parts other than "values" may have a last axis of their own."""
        ...

    def decode(self, stored: Stored, dtype: Any) -> jax.Array:
        """What `encode` packed, in `dtype`."""
        ...


FORMATS: Registry[Format] = Registry("format", __name__)


def _names(role: str) -> tuple[str, ...]:
    return tuple(name for name in FORMATS.names() if getattr(FORMATS[name], role))


KNOBS: Mapping[str, Knob] = {
    "weights": choice("float32", lambda: _names("weights")),
    "kv_cache": choice("float32", lambda: _names("cache")),
    "activations": choice("float32", lambda: _names("activations")),
}


@dataclass(frozen=True)
class Precision:
    """The formats, by name, of the matrices, of the KV cache, and the dtype of everything in between."""

    weights: str = "float32"
    kv_cache: str = "float32"
    activations: str = "float32"

    @classmethod
    def of(cls, choices: Choices) -> "Precision":
        return cls(**{name: str(choices.get(name, knob.default)) for name, knob in KNOBS.items()})
