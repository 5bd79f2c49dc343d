"""IEEE-like formats that the processor converts by itself: the values are stored as they are."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosearch.precision import Stored, refuse_not_finite
from cosearch.schedule.matmul import contract, take_columns


@dataclass(frozen=True)
class Floating:
    """A floating-point dtype that numpy (with ml_dtypes) and JAX both know. What is too large becomes an infinity."""

    dtype: Any
    weights: bool = True
    cache: bool = True
    activations: bool = True
    inputs = ()
    calibrations = ("absmax",)

    def why_not(self, rows: int, columns: int) -> str | None:
        return None

    def spec(self, rows: int, columns: int, layout: str) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (rows, columns) if layout == "in_out" else (columns, rows)
        return {"values": jax.ShapeDtypeStruct(shape, self.dtype)}

    def pack(self, weights: Any, layout: str, scale: Any | None = None) -> dict[str, Any]:
        refuse_not_finite(weights)
        ordered = weights if layout == "in_out" else weights.T
        return {"values": ordered.astype(self.dtype).copy()}  # in C order, for numpy keeps that of `weights`

    def unpack(self, stored: Stored, layout: str) -> np.ndarray:
        values = np.asarray(stored["values"]).astype(np.float64)
        return values if layout == "in_out" else values.T

    def bound(self, weights: np.ndarray) -> np.ndarray:
        """Half a unit in the last place; below the normal numbers, of the smallest one."""
        kind = jnp.finfo(self.dtype)
        size = np.maximum(np.abs(weights).astype(np.float64), float(kind.smallest_normal))
        return float(kind.eps) / 2 * size

    def dequantize(self, stored: Stored, layout: str, dtype: Any) -> jax.Array:
        return stored["values"].astype(dtype)

    def matmul(self, x: jax.Array, stored: Stored, layout: str, lowering: str, inputs: str) -> jax.Array:
        return contract(x, stored["values"], layout, lowering)

    def columns(self, stored: Stored, indices: jax.Array, layout: str, dtype: Any) -> jax.Array:
        return take_columns(stored["values"], indices, layout).astype(dtype)

    def encode(self, x: jax.Array) -> dict[str, jax.Array]:
        return {"values": x.astype(self.dtype)}

    def decode(self, stored: Stored, dtype: Any) -> jax.Array:
        return stored["values"].astype(dtype)

    def cache_bound(self, x: np.ndarray) -> np.ndarray:
        return self.bound(x)
