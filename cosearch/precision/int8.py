"""Symmetric 8-bit integers with one float32 scale an output channel; for the KV cache, a token and head.

A value is stored as round(value / scale) with scale = absmax / 127, so the error is at most half a step,
absmax / 254, and -128 is not used. NaN and infinities have no place: packing refuses them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosearch.core.errors import Rejected
from cosearch.precision import FORMATS, Stored
from cosearch.schedule.matmul import contract, take_columns


class Int8:
    weights = True
    cache = True
    activations = False
    # Half a step, and a little for the rounding of the float32 scale itself.
    relative_error = 0.5 / 127 + 1e-6

    def bits_per_weight(self, rows: int, columns: int) -> float:
        return 8.0 + 32.0 / rows

    def spec(self, rows: int, columns: int, layout: str) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (rows, columns) if layout == "in_out" else (columns, rows)
        return {
            "values": jax.ShapeDtypeStruct(shape, jnp.int8),
            "scale": jax.ShapeDtypeStruct((columns,), jnp.float32),
        }

    def pack(self, weights: np.ndarray, layout: str) -> dict[str, np.ndarray]:
        if not np.isfinite(weights).all():
            raise Rejected("weights hold NaN or infinities and are not packed as int8")
        scale = np.abs(weights).max(axis=0).astype(np.float32) / np.float32(127)
        values = np.rint(weights / np.where(scale > 0, scale, 1)).clip(-127, 127).astype(np.int8)
        return {"values": np.ascontiguousarray(values if layout == "in_out" else values.T), "scale": scale}

    def unpack(self, stored: Stored, layout: str) -> np.ndarray:
        values = np.asarray(stored["values"]).astype(np.float64)
        return (values if layout == "in_out" else values.T) * np.asarray(stored["scale"], np.float64)

    def matmul(self, x: jax.Array, stored: Stored, layout: str, lowering: str) -> jax.Array:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        product = contract(x, stored["values"], layout, lowering, out_dtype=dtype)
        return (product * stored["scale"]).astype(x.dtype)

    def columns(self, stored: Stored, indices: jax.Array, layout: str, dtype: Any) -> jax.Array:
        values = take_columns(stored["values"], indices, layout).astype(jnp.promote_types(dtype, jnp.float32))
        return (values * stored["scale"][indices][..., None]).astype(dtype)

    def encode(self, x: jax.Array) -> dict[str, jax.Array]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        values = jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
        return {"values": values, "scale": scale.astype(jnp.float32)}

    def decode(self, stored: Stored, dtype: Any) -> jax.Array:
        wide = jnp.promote_types(dtype, jnp.float32)
        return (stored["values"].astype(wide) * stored["scale"].astype(wide)).astype(dtype)


FORMATS.register("int8")(Int8())
