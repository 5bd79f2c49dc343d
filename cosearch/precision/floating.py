"""IEEE-like formats that the processor converts by itself: the values are stored as they are."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosearch.core.errors import Rejected
from cosearch.precision import Stored
from cosearch.schedule.matmul import contract, take_columns


@dataclass(frozen=True)
class Floating:
    """A floating-point dtype that numpy (with ml_dtypes) and JAX both know."""

    dtype: Any
    weights: bool = True
    cache: bool = True
    activations: bool = True

    @property
    def relative_error(self) -> float:
        return float(jnp.finfo(self.dtype).eps) / 2

    def bits_per_weight(self, rows: int, columns: int) -> float:
        return 8.0 * np.dtype(self.dtype).itemsize

    def spec(self, rows: int, columns: int, layout: str) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (rows, columns) if layout == "in_out" else (columns, rows)
        return {"values": jax.ShapeDtypeStruct(shape, self.dtype)}

    def pack(self, weights: np.ndarray, layout: str) -> dict[str, np.ndarray]:
        if not np.isfinite(weights).all():
            raise Rejected(f"weights hold NaN or infinities and are not packed as {np.dtype(self.dtype).name}")
        return {"values": np.ascontiguousarray(weights if layout == "in_out" else weights.T).astype(self.dtype)}

    def unpack(self, stored: Stored, layout: str) -> np.ndarray:
        values = np.asarray(stored["values"]).astype(np.float64)
        return values if layout == "in_out" else values.T

    def matmul(self, x: jax.Array, stored: Stored, layout: str, lowering: str) -> jax.Array:
        return contract(x, stored["values"], layout, lowering)

    def columns(self, stored: Stored, indices: jax.Array, layout: str, dtype: Any) -> jax.Array:
        return take_columns(stored["values"], indices, layout).astype(dtype)

    def encode(self, x: jax.Array) -> dict[str, jax.Array]:
        return {"values": x.astype(self.dtype)}

    def decode(self, stored: Stored, dtype: Any) -> jax.Array:
        return stored["values"].astype(dtype)
