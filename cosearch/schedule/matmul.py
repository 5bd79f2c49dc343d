"""Lowerings of products: the same mathematics, given to the compiler in different words.

Which one wins depends on the dtype, the layout and the compiler: on one CPU a float32 matrix-vector product
took 4 ms from [in, out] by `dot` and 64 ms from [out, in], and int8 7 ms as `multiply_reduce` over [out, in]
against 88 ms by `dot`. That is why it is a knob.
"""

from typing import Any

import jax
import jax.numpy as jnp

MATMULS = ("dot", "multiply_reduce")
LAYOUTS = ("in_out", "out_in")

MOST_ROWS = 16
"""Beyond so many rows `multiply_reduce` would repeat the whole matrix's work with no reuse; `dot` takes over."""


def contract(x: jax.Array, matrix: jax.Array, layout: str, lowering: str, out_dtype: Any | None = None) -> jax.Array:
    """`x` [..., in] times `matrix` ([in, out] or [out, in] by `layout`), [..., out].

    Summed in the dtype of `accumulator`. `out_dtype` is, if not given, the dtype of `x`, or that of the sums where `x`
    is of integers, which would not hold them.
    """
    rows, wide = x.reshape(-1, x.shape[-1]), accumulator(x, matrix)
    if lowering == "multiply_reduce" and len(rows) <= MOST_ROWS:
        out = multiply_reduce("ri,io->ro" if layout == "in_out" else "ri,oi->ro", rows, matrix)
    else:
        axis = 0 if layout == "in_out" else 1
        out = jax.lax.dot_general(
            rows, matrix.astype(x.dtype), (((1,), (axis,)), ((), ())), preferred_element_type=wide
        )
    narrow = wide if jnp.issubdtype(x.dtype, jnp.integer) else x.dtype
    return out.reshape(*x.shape[:-1], out.shape[-1]).astype(out_dtype or narrow)


def take_columns(matrix: jax.Array, indices: jax.Array, layout: str) -> jax.Array:
    """The columns [..., in] of a matrix ([in, out] or [out, in] by `layout`) at `indices` [...]."""
    return matrix[indices] if layout == "out_in" else jnp.moveaxis(matrix[:, indices], 0, -1)


def accumulator(x: jax.Array, large: jax.Array) -> Any:
    """The dtype that products of `x` and `large` are summed in."""
    if jnp.issubdtype(x.dtype, jnp.integer) and jnp.issubdtype(large.dtype, jnp.integer):
        return jnp.dtype(jnp.int32)
    return jnp.promote_types(x.dtype, jnp.float32)


def multiply_reduce(subscripts: str, x: jax.Array, large: jax.Array) -> jax.Array:
    """`jnp.einsum(subscripts, x, large)` as one elementwise product and a sum, in the dtype of `accumulator`.

    The product runs in the memory order of `large`, whose conversion to that dtype is fused into it. Axes of size 1
    are taken off first: with them the CPU compiler emits a loop that is 20 times slower (1024 x 1024, 4.6 ms
    against 0.21 ms).
    """
    inputs, result = subscripts.split("->")
    x_axes, large_axes = inputs.split(",")
    size = dict(zip(x_axes, x.shape, strict=True)) | dict(zip(large_axes, large.shape, strict=True))
    order = [a for a in x_axes if a not in large_axes and size[a] > 1] + [a for a in large_axes if size[a] > 1]
    wide = accumulator(x, large)

    def spread(array: jax.Array, axes: str) -> jax.Array:
        kept = [a for a in axes if size[a] > 1]
        array = array.reshape([size[a] for a in kept]).transpose([kept.index(a) for a in order if a in kept])
        return jax.lax.broadcast_in_dim(array, [size[a] for a in order], [i for i, a in enumerate(order) if a in kept])

    # Without the barrier XLA fuses what computes `x` into the loop and runs it once for every output.
    x = jax.lax.optimization_barrier(x.astype(wide))
    summed = tuple(i for i, a in enumerate(order) if a not in result)
    out = (spread(x, x_axes) * spread(large.astype(wide), large_axes)).sum(axis=summed, dtype=wide)
    left = [a for a in order if a in result]
    out = out.transpose([left.index(a) for a in result if a in left])
    return out.reshape([size[a] for a in result])
