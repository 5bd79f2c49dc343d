"""Lowerings of the matrix product: the same mathematics, given to the compiler in different words.

Which one wins depends on the dtype, the layout and the compiler: on one CPU a float32 matrix-vector product
took 4 ms from [in, out] by `dot` and 64 ms from [out, in], and int8 7 ms as `multiply_reduce` over [out, in]
against 88 ms by `dot`. That is why it is a knob.
"""

from typing import Any

import jax
import jax.numpy as jnp

MATMULS = ("dot", "multiply_reduce")
LAYOUTS = ("in_out", "out_in")

_MOST_ROWS = 16
"""Beyond so many rows `multiply_reduce` would repeat the whole matrix's work with no reuse; `dot` takes over."""


def contract(
    x: jax.Array, matrix: jax.Array, layout: str, lowering: str, out_dtype: Any | None = None
) -> jax.Array:
    """`x` [..., in] times `matrix` ([in, out] or [out, in] by `layout`), [..., out].

    Accumulated in at least float32; `out_dtype` is the dtype of `x` if not given.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows = x.size // x.shape[-1]
    axis = 0 if layout == "in_out" else 1
    if lowering == "multiply_reduce" and rows <= _MOST_ROWS:
        matrix = matrix.astype(wide)
        vector = x.astype(wide)
        product = vector[..., :, None] * matrix if layout == "in_out" else vector[..., None, :] * matrix
        out = product.sum(axis=-2 if layout == "in_out" else -1)
    else:
        out = jax.lax.dot_general(
            x, matrix.astype(x.dtype), (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=wide
        )
    return out.astype(out_dtype or x.dtype)
