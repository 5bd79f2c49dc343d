"""Small parameters that are kept in at least float32: the scales of norms, and what a variant needs beside matrices."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Vector(nnx.Module):
    """An array of parameters that no format packs and no pattern prunes. It is born abstract."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.scale = nnx.Param(jax.ShapeDtypeStruct(shape, dtype))

    def __call__(self) -> jax.Array:
        return self.scale[...]


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x` [..., N] over the root of its mean square, times `scale` [N], computed in at least float32 (Zhang and
    Sennrich 2019, arXiv:1910.07467)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + 1e-6) * scale).astype(x.dtype)
