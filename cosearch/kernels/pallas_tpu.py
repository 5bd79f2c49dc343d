"""Products and attention for TPUs (v5e, v6e and their like) in Pallas, by its backend Mosaic TPU.

A TPU's core runs the steps of a grid one after the other and copies the next step's blocks meanwhile, so a sum stays in
its memory over the steps of the last axis, and nothing has to be split for parallelism.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS, CachedAttention, Product, Stored

CACHES = ("bfloat16", "float8_e4m3", "int8")
GROUPS = {"int4_g32": 32, "int4_g64": 64, "int4_g128": 128}
"""The formats with two weights in a byte, and how many rows share a scale."""
WEIGHTS = (*CACHES, *GROUPS)

_GROUPED_ROWS = 1024
"""Eight groups of 128: scales are stored in tiles of 8 rows."""

_MOST_TOKENS = 64
_LANES = 128
"""Arrays are stored in tiles whose last axis is as long."""


@dataclass(frozen=True)
class PallasTpuMatmul:
    """Matrix products of few tokens: a step multiplies a block of up to `block_rows` x `block_columns` weights.

    `interpret` runs JAX's simulation of a TPU's memories instead.
    """

    block_rows: int = 1024
    block_columns: int = 512
    interpret: bool = False
    platforms = frozenset({"tpu"})
    layout = "in_out"

    def why_unavailable(self) -> str | None:
        return None

    def why_not(self, product: Product) -> str | None:
        if product.compression is not None:
            return "it reads every weight, and these are compressed"
        if product.format not in WEIGHTS:
            return f"it reads weights in {', '.join(WEIGHTS)}, not {product.format}"
        if product.dtype not in ("bfloat16", "float32"):
            return f"it multiplies bfloat16 or float32, not {product.dtype}"
        if product.inputs != "as_is":
            return f"it multiplies inputs as they are, not rounded to {product.inputs}"
        if product.tokens > _MOST_TOKENS:
            return f"it is for up to {_MOST_TOKENS} tokens, not {product.tokens}"
        if product.format in GROUPS and product.layout != "in_out":
            return f"groups of {product.format} are whole tiles in in_out, not in {product.layout}"
        if product.format in GROUPS and product.rows % _GROUPED_ROWS:
            return f"scales of {product.format} are whole tiles of {_GROUPED_ROWS} rows, and {product.rows} no multiple"
        if product.rows % _LANES or product.columns % _LANES:
            return f"{product.rows} x {product.columns} is not a multiple of {_LANES} x {_LANES}"
        return None

    def __call__(self, x: jax.Array, stored: Stored, product: Product) -> jax.Array:
        tokens, in_out, group = product.tokens, product.layout == "in_out", GROUPS.get(product.format)
        rows = _GROUPED_ROWS if group else _divisor(product.rows, self.block_rows)
        columns, steps = _divisor(product.columns, self.block_columns), product.rows // rows
        scale = stored.get("scale", jnp.ones(product.columns, jnp.float32))
        scale = scale if group else scale.reshape(1, -1)

        def body(x_ref: Any, values_ref: Any, scale_ref: Any, out_ref: Any, sums_ref: Any) -> None:
            step = pl.program_id(1)

            @pl.when(step == 0)
            def begin() -> None:
                sums_ref[...] = jnp.zeros_like(sums_ref)

            weights = values_ref[...]
            if group:
                weights = _restore(weights, scale_ref[...], x.dtype)
            sums_ref[...] += _product(x_ref[...], weights, 0 if in_out else 1)

            @pl.when(step == steps - 1)
            def end() -> None:
                out = sums_ref[...] if group else sums_ref[...] * scale_ref[...]
                out_ref[...] = out.astype(out_ref.dtype)

        down = (rows // 2 if group else rows, columns)
        if in_out:
            weights = pl.BlockSpec(down, lambda column, row: (row, column))
        else:
            weights = pl.BlockSpec(down[::-1], lambda column, row: (column, row))
        if group:
            scales = pl.BlockSpec((rows // group, columns), lambda column, row: (row, column))
        else:
            scales = pl.BlockSpec((1, columns), lambda column, row: (0, column))
        return pl.pallas_call(
            body,
            grid=(product.columns // columns, steps),
            in_specs=[
                pl.BlockSpec((tokens, rows), lambda column, row: (0, row)),
                weights,
                scales,
            ],
            out_specs=pl.BlockSpec((tokens, columns), lambda column, row: (0, column)),
            out_shape=jax.ShapeDtypeStruct((tokens, product.columns), x.dtype),
            scratch_shapes=[pltpu.VMEM((tokens, columns), jnp.float32)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=_interpret(self.interpret),
        )(x, stored["values"], scale)


@dataclass(frozen=True)
class PallasTpuAttention:
    """Decode attention that goes through the cache in blocks of `block` slots, none of them past the length, with a
    running softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). `interpret` as for products.
    """

    block: int = 512
    interpret: bool = False
    platforms = frozenset({"tpu"})

    def why_unavailable(self) -> str | None:
        return None

    def why_not(self, attention: CachedAttention) -> str | None:
        if attention.format not in CACHES:
            return f"it reads caches in {', '.join(CACHES)}, not {attention.format}"
        if attention.layout != "bhsd":
            return f"it reads tiles of slots and numbers, which {attention.layout} does not have; bhsd has"
        if attention.dtype not in ("bfloat16", "float32"):
            return f"it multiplies bfloat16 or float32, not {attention.dtype}"
        if attention.slots % _LANES:
            return f"it reads {_LANES} slots at a time, and {attention.slots} are not a multiple"
        return None

    def __call__(
        self, query_BHD: jax.Array, key: Stored, value: Stored, length: jax.Array, attention: CachedAttention
    ) -> jax.Array:
        batch, heads, width = query_BHD.shape
        kv_heads, sharing = attention.kv_heads, heads // attention.kv_heads
        size = _divisor(attention.slots, self.block)
        blocks = attention.slots // size
        scaled = "scale" in key

        def body(length_ref: Any, query_ref: Any, key_ref: Any, value_ref: Any, *refs: Any) -> None:
            scales, (out_ref, sums_ref, largest_ref, weight_ref) = refs[: 2 * scaled], refs[2 * scaled :]
            block = pl.program_id(2)

            @pl.when(block == 0)
            def begin() -> None:
                sums_ref[...] = jnp.zeros_like(sums_ref)
                largest_ref[...] = jnp.full_like(largest_ref, -jnp.inf)
                weight_ref[...] = jnp.zeros_like(weight_ref)

            @pl.when(block * size < length_ref[0])
            def attend() -> None:
                scores = _product(query_ref[0, 0], key_ref[0, 0], 1) * width**-0.5
                if scaled:
                    scores *= scales[0][0, 0].astype(jnp.float32)
                slot = block * size + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
                scores = jnp.where(slot < length_ref[0], scores, -jnp.inf)
                largest = jnp.maximum(largest_ref[...], scores.max(axis=1, keepdims=True))
                faded, weights = jnp.exp(largest_ref[...] - largest), jnp.exp(scores - largest)
                largest_ref[...] = largest
                weight_ref[...] = weight_ref[...] * faded + weights.sum(axis=1, keepdims=True)
                if scaled:
                    weights *= scales[1][0, 0].astype(jnp.float32)
                added = _product(weights.astype(query_ref.dtype), value_ref[0, 0], 0)
                sums_ref[...] = sums_ref[...] * faded + added

            @pl.when(block == blocks - 1)
            def end() -> None:
                out_ref[0, 0] = (sums_ref[...] / weight_ref[...]).astype(out_ref.dtype)

        def queries(batch: Any, head: Any, _: Any, __: Any) -> Any:
            return batch, head, 0, 0

        def last(block: Any, length_ref: Any) -> Any:  # a block that is not read is not copied again
            return jnp.minimum(block, (length_ref[0] - 1) // size)

        cached = pl.BlockSpec((1, 1, size, width), lambda b, head, block, length: (b, head, last(block, length), 0))
        scale = pl.BlockSpec((1, 1, 1, size), lambda b, head, block, length: (b, head, 0, last(block, length)))
        out = pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(batch, kv_heads, blocks),
                in_specs=[pl.BlockSpec((1, 1, sharing, width), queries), cached, cached, *[scale] * (2 * scaled)],
                out_specs=pl.BlockSpec((1, 1, sharing, width), queries),
                scratch_shapes=[pltpu.VMEM((sharing, last_axis), jnp.float32) for last_axis in (width, 1, 1)],
            ),
            out_shape=jax.ShapeDtypeStruct((batch, kv_heads, sharing, width), query_BHD.dtype),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            interpret=_interpret(self.interpret),
        )(
            length.reshape(1).astype(jnp.int32),
            query_BHD.reshape(batch, kv_heads, sharing, width),
            key["values"],
            value["values"],
            *([part["scale"].swapaxes(2, 3) for part in (key, value)] if scaled else []),
        )
        return out.reshape(batch, heads, width)


def _product(left: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """`left` [m, k] times `right`, whose `axis` is k, summed in float32."""
    # Mosaic refuses a precision for products of bfloat16 that is set for all of a process.
    exact = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        left, right.astype(left.dtype), (((1,), (axis,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def _restore(codes: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """The weights [rows, columns] of bytes [rows / 2, columns], whose groups have the scales [groups, columns]."""
    tiles = codes.reshape(len(scale), -1, codes.shape[1]).astype(jnp.int32)
    weights = jnp.concatenate([tiles & 15, tiles >> 4], axis=1) - 8
    return (weights.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]).reshape(-1, codes.shape[1]).astype(dtype)


def _divisor(size: int, most: int) -> int:
    """The largest multiple of 128, up to `most`, that divides `size`."""
    return max(block for block in range(_LANES, min(size, most) + 1, _LANES) if size % block == 0)


def _interpret(interpret: bool) -> Any:
    return pltpu.InterpretParams(out_of_bounds_reads="raise") if interpret else False


MATMUL_KERNELS.register("pallas_tpu")(PallasTpuMatmul())
ATTENTION_KERNELS.register("pallas_tpu")(PallasTpuAttention())
