"""Products and attention for Hopper GPUs (H100, H200) in Pallas, by its backend Mosaic GPU.

Both read each weight or cached number once, by the copy engine into shared memory, and multiply on the tensor cores,
whose tiles are 64 rows high. Decoding has fewer tokens than that, so the large operand is the left one: its columns, or
slots, are the tile's rows, and the tokens, or the queries that share a head, its few columns.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS, CachedAttention, Product, Stored
from cosearch.precision import FORMATS
from cosearch.precision.quantized import Quantized

WEIGHTS = ("bfloat16", "float8_e4m3", "int8", "int4_g64", "int4_g128")
CACHES = ("bfloat16", "float8_e4m3", "int8")

_MOST_TOKENS = 64
"""Beyond so many, products are bound by arithmetic, for which XLA has kernels."""

_SHARED_BYTES = 200_000
"""Of the 227 KiB of shared memory that a thread block can have, what copies may take."""


def _why_unavailable() -> str | None:
    if tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11):
        return f"it is written for Mosaic GPU as JAX 0.11 has it, and this is {jax.__version__}"
    return None


@dataclass(frozen=True)
class PallasGpuMatmul:
    """Matrix products of few tokens.

    A thread block multiplies `block_columns` columns by its share of the rows, `block_bytes` of a column at a time, or
    a group of 4-bit codes, with `stages` copies under way. Rows are shared out until there are up to `thread_blocks`;
    XLA adds the shares. `interpret` runs JAX's simulation of a GPU's memories instead.
    """

    block_columns: int = 64
    block_bytes: int = 512
    stages: int = 2
    thread_blocks: int = 264  # two for each multiprocessor
    interpret: bool = False
    platforms = frozenset({"gpu"})
    layout = "out_in"

    def why_unavailable(self) -> str | None:
        return _why_unavailable()

    def why_not(self, product: Product) -> str | None:
        if product.compression is not None:
            return "it reads every weight, and these are compressed"
        if product.format not in WEIGHTS:
            return f"it reads weights in {', '.join(WEIGHTS)}, not {product.format}"
        if product.dtype != "bfloat16":
            return f"the tensor cores multiply bfloat16, not {product.dtype}"
        if product.inputs != "as_is":
            return f"it multiplies inputs as they are, not rounded to {product.inputs}"
        if product.tokens > _MOST_TOKENS:
            return f"it is for up to {_MOST_TOKENS} tokens, not {product.tokens}"
        if product.format == "int4_g64" and product.layout == "in_out":
            return "half a group, 32 rows, is too low for a tile of int4_g64 in in_out"
        if product.columns % self.block_columns or product.rows % self._block_rows(product):
            return f"{product.rows} x {product.columns} is not a multiple of {self._tile(product)}"
        return None

    def __call__(self, x: jax.Array, stored: Stored, product: Product) -> jax.Array:
        values, scale = stored["values"], stored.get("scale")
        group, in_out = _group(product.format), product.layout == "in_out"
        rows, columns = self._tile(product)
        x, tokens = _in_eights(x, 0), -(-product.tokens // 8) * 8
        by_column = scale is not None and group is None
        halves = 2 if group else 1  # of a tile's rows: low nibbles and high ones
        steps, shares = product.rows // rows, self._shares(product)
        across = (tokens, rows // halves)
        down = (rows // halves, columns) if in_out else (columns, rows // halves)
        # The tensor cores take the left operand from registers in the order "out_in" only, but bfloat16, which is not
        # converted, in either order from shared memory; the simulation takes all operands from there.
        staged = values.dtype != jnp.bfloat16 and (in_out or self.interpret)

        def body(x_ref: Any, values_ref: Any, *refs: Any) -> None:
            scales, (out_ref, out_s, *scratch) = refs[: scale is not None], refs[scale is not None :]
            named: Any = scratch if by_column else (None, None, *scratch)
            scale_s, copied, *stages = named
            column, share = lax.axis_index("column"), lax.axis_index("share")
            here = pl.ds(column * columns, columns)
            start = share * 0  # where JAX sees that a slice goes beyond the end, it refuses it
            if by_column:
                plgpu.copy_gmem_to_smem(scales[0].at[here], scale_s, copied)

            def row(step: Any) -> Any:
                return share * (steps // shares) + step

            def multiply(_: Any, *tiles: Any) -> jax.Array:
                x_tiles, values_tile, sums = tiles[:halves], tiles[halves], tiles[-1]
                weights = [values_tile]
                if values.dtype != jnp.bfloat16:
                    weights = _operands(values_tile[...], stages, halves)
                if in_out:
                    weights = [half.transpose((1, 0)) for half in weights]

                def accumulate(accumulator: Any) -> jax.Array:
                    for x_tile, half in zip(x_tiles, weights, strict=True):
                        plgpu.wgmma(accumulator, half, x_tile.transpose((1, 0)))
                    return accumulator[...]

                added = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((columns, tokens), jnp.float32))
                return sums + (_by_row(added, tiles[-2][0]) if group else added)

            specs = [
                plgpu.BlockSpec(
                    across, lambda step, h=h: (start, row(step) * halves + h), transforms=_tiling(across, x.dtype)
                )
                for h in range(halves)
            ]
            order = (lambda step: (row(step), column)) if in_out else (lambda step: (column, row(step)))
            specs.append(plgpu.BlockSpec(down, order, transforms=_tiling(down, values.dtype)))
            if group:
                specs.append(plgpu.BlockSpec((1, columns), lambda step: (row(step), column)))
            pipeline = plgpu.emit_pipeline(
                multiply,
                grid=(steps // shares,),
                in_specs=specs,
                max_concurrent_steps=min(self.stages, steps // shares),
                init_carry=jnp.zeros((columns, tokens), jnp.float32),
            )
            out = pipeline(*[x_ref] * halves, values_ref, *scales[: group is not None])
            if by_column:
                plgpu.barrier_wait(copied)
                out = _by_row(out, scale_s[...])
            _transpose(out.astype(out_s.dtype), out_s)
            plgpu.copy_smem_to_gmem(out_s, out_ref.at[share, pl.ds(start, tokens), here])
            plgpu.wait_smem_to_gmem(0)

        dtype = x.dtype if shares == 1 else jnp.float32
        scratch: list[Any] = [_shared((tokens, columns), dtype)]
        inputs = [x, values]
        if scale is not None and group:
            inputs.append(scale if in_out else scale.T)
        elif scale is not None:
            inputs.append(scale.reshape(-1))
            scratch += [plgpu.SMEM((columns,), jnp.float32), plgpu.Barrier()]
        if staged:
            scratch += [_shared(down, jnp.bfloat16)] * halves
        kernel = plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((shares, len(x), product.columns), dtype),
            scratch_types=scratch,
            grid=(product.columns // columns, shares),
            grid_names=("column", "share"),
            compiler_params=_PARAMS,
            interpret=_interpret(self.interpret),
        )
        return kernel(*inputs)[:, : product.tokens].sum(axis=0).astype(x.dtype)

    def _block_rows(self, product: Product) -> int:
        if group := _group(product.format):
            return group
        size = 2 if product.format == "bfloat16" else 1
        tokens = -(-product.tokens // 8) * 8
        rows = self.block_bytes // size
        # What lies in shared memory for each row of a block: copies of weights and inputs, and what is converted.
        each = self.stages * (self.block_columns * size + tokens * 2) + self.block_columns * 2
        while rows > 64 and (product.rows % rows or rows * each > _SHARED_BYTES):
            rows //= 2
        return rows

    def _tile(self, product: Product) -> tuple[int, int]:
        return self._block_rows(product), self.block_columns

    def _shares(self, product: Product) -> int:
        """How many thread blocks share the rows of a column: as many as divide them evenly, up to `thread_blocks`."""
        rows, columns = self._tile(product)
        steps, most = product.rows // rows, max(1, self.thread_blocks // (product.columns // columns))
        return max(share for share in range(1, min(steps, most) + 1) if steps % share == 0)


@dataclass(frozen=True)
class PallasGpuAttention:
    """Decode attention split over the context (FlashDecoding, Dao et al. 2023,
    https://crfm.stanford.edu/2023/10/12/flashdecoding.html).

    A thread block attends to `block` slots of a key/value head with all the queries that share it, and leaves a sum,
    its largest score and its weight; XLA combines those of all blocks. Blocks are small enough for several to be
    on a multiprocessor, so that one computes while others copy. `interpret` as for products.
    """

    block: int = 128
    interpret: bool = False
    platforms = frozenset({"gpu"})

    def why_unavailable(self) -> str | None:
        return _why_unavailable()

    def why_not(self, attention: CachedAttention) -> str | None:
        if attention.format not in CACHES:
            return f"it reads caches in {', '.join(CACHES)}, not {attention.format}"
        if attention.layout not in ("bshd", "bhsd"):
            return f"it reads a slot's numbers at once, which {attention.layout} scatters"
        if attention.dtype != "bfloat16":
            return f"the tensor cores multiply bfloat16, not {attention.dtype}"
        if attention.head_dim not in (64, 128, 256):
            return f"heads are 64, 128 or 256 wide, not {attention.head_dim}"
        if attention.slots % 8 and attention.slots > 8:
            return f"slots are copied by eights, and {attention.slots} are not a multiple"
        if attention.heads // attention.kv_heads > 32:
            return f"up to 32 queries share a head, not {attention.heads // attention.kv_heads}"
        return None

    def __call__(
        self, query_BHD: jax.Array, key: Stored, value: Stored, length: jax.Array, attention: CachedAttention
    ) -> jax.Array:
        batch, heads, width = query_BHD.shape
        kv_heads, sharing = attention.kv_heads, heads // attention.kv_heads
        queries = -(-sharing // 8) * 8
        size, blocks = self.block, -(-attention.slots // self.block)
        scaled, by_head = "scale" in key, attention.layout == "bhsd"

        def body(length_ref: Any, query_ref: Any, *refs: Any) -> None:
            inputs, (out_ref, weight_ref, *scratch) = refs[: 2 + 2 * scaled], refs[2 + 2 * scaled :]
            key_copied, value_copied, query_s, key_s, value_s, weights_s, out_s, weight_s, *scratch = scratch
            named: Any = scratch if scaled else (None, None)
            key_scale_s, value_scale_s, *stages = named
            batch, head, block = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("block")
            slots = pl.ds(block * size, size)
            here = (batch, head, slots) if by_head else (batch, slots, head)

            @pl.when(block * size < length_ref[0])
            def attend() -> None:
                all_queries = pl.ds(block * 0, queries)  # as for products
                sharers = query_ref.at[batch * kv_heads + head, all_queries]
                plgpu.copy_gmem_to_smem(sharers, query_s, key_copied)
                plgpu.copy_gmem_to_smem(inputs[0].at[here], key_s, key_copied)
                plgpu.copy_gmem_to_smem(inputs[1].at[here], value_s, value_copied)
                if scaled:
                    plgpu.copy_gmem_to_smem(inputs[2].at[batch, head, slots], key_scale_s, key_copied)
                    plgpu.copy_gmem_to_smem(inputs[3].at[batch, head, slots], value_scale_s, value_copied)

                def multiply_keys(accumulator: Any) -> jax.Array:
                    keys = _operands(key_s[...], stages[1:])[0] if scaled else key_s
                    plgpu.wgmma(accumulator, keys, query_s.transpose((1, 0)))
                    return accumulator[...]

                plgpu.barrier_wait(key_copied)
                scores = pl.run_scoped(multiply_keys, plgpu.WGMMAAccumulatorRef((size, queries), jnp.float32))
                scores *= width**-0.5 * math.log2(math.e)
                if scaled:
                    scores = _by_row(scores, key_scale_s[...])
                slot = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
                scores = jnp.where(slot < length_ref[0] - block * size, scores, -jnp.inf)
                largest = scores.max(axis=0)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(largest, scores.shape, [1]))
                weight = weights.sum(axis=0)
                plgpu.barrier_wait(value_copied)
                if scaled:
                    weights = _by_row(weights, value_scale_s[...])
                _transpose(weights.astype(jnp.bfloat16), weights_s)

                def multiply_values(accumulator: Any) -> jax.Array:
                    if not scaled:
                        plgpu.wgmma(accumulator, value_s.transpose((1, 0)), weights_s.transpose((1, 0)))
                    for start in range(0, size if scaled else 0, 64):  # few at a time leave room for more thread blocks
                        some = pl.ds(start, 64)
                        plgpu.wgmma_wait(0)
                        (values,) = _operands(value_s[some], stages[:1])
                        plgpu.wgmma(accumulator, values.transpose((1, 0)), weights_s.at[:, some].transpose((1, 0)))
                    return accumulator[...]

                out = pl.run_scoped(multiply_values, plgpu.WGMMAAccumulatorRef((width, queries), jnp.float32))
                weight_s[...] = largest + jnp.log2(weight)
                _transpose(out / lax.broadcast_in_dim(weight, out.shape, [1]), out_s)
                place = (batch * kv_heads + head) * blocks + block
                plgpu.copy_smem_to_gmem(out_s, out_ref.at[place, all_queries])
                plgpu.copy_smem_to_gmem(weight_s, weight_ref.at[place])
                plgpu.wait_smem_to_gmem(0)

        bf16, wide = jnp.bfloat16, (size, width)
        scratch = [plgpu.Barrier(num_arrivals=2 + scaled), plgpu.Barrier(num_arrivals=1 + scaled)]
        scratch += [_shared((queries, width), bf16), *[_shared(wide, key["values"].dtype)] * 2]
        scratch += [_shared((queries, size), bf16), _shared((queries, width), jnp.float32)]
        scratch += [plgpu.SMEM((queries,), jnp.float32)]
        if scaled:
            scratch += [*[plgpu.SMEM((size,), bf16)] * 2, _shared((64, width), bf16)]
            scratch += [_shared(wide, bf16)] * self.interpret
        query = _in_eights(query_BHD.reshape(-1, sharing, width), 1)
        each = batch * kv_heads * blocks
        kernel = plgpu.kernel(
            body,
            out_type=(
                jax.ShapeDtypeStruct((each, query.shape[1], width), jnp.float32),
                jax.ShapeDtypeStruct((each, queries), jnp.float32),
            ),
            scratch_types=scratch,
            grid=(kv_heads, blocks, batch),
            grid_names=("head", "block", "batch"),
            compiler_params=_PARAMS,
            interpret=_interpret(self.interpret),
        )
        inputs = [query, key["values"], value["values"]]
        if scaled:
            scales = [part["scale"][..., 0] for part in (key, value)]
            scales = scales if by_head else [scale.transpose(0, 2, 1) for scale in scales]
            inputs += [jnp.pad(scale, ((0, 0), (0, 0), (0, -attention.slots % 8))) for scale in scales]
        out, weight = kernel(length.reshape(1).astype(jnp.int32), *inputs)
        # A block past the length has left its outputs as they were, which may be anything.
        read = (jnp.arange(blocks) * size < length)[:, None]
        weight = jnp.where(read, weight.reshape(batch * kv_heads, blocks, queries)[..., :sharing], -jnp.inf)
        weight = jax.nn.softmax(weight * math.log(2), axis=1)[..., None]
        out = out[:, :sharing].reshape(batch * kv_heads, blocks, sharing, width)
        out = jnp.where(read[..., None], out, 0)
        return (out * weight).sum(axis=1).reshape(batch, heads, width).astype(query_BHD.dtype)


_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def _group(name: str) -> int | None:
    """How many rows share a scale; None for the whole column, and where there are no scales."""
    form = FORMATS[name]
    return form.group if isinstance(form, Quantized) else None


def _operands(codes: jax.Array, stages: Any, halves: int = 1) -> list[Any]:
    """Codes of a byte, or the low nibbles and the high ones, in bfloat16, for the tensor cores to read: in `stages`,
    arrays in shared memory, where there are any, else in registers."""
    codes = plgpu.layout_cast(codes, plgpu.Layout.WGMMA_UPCAST_2X)  # else bytes are loaded by twos
    if not stages:
        codes = plgpu.layout_cast(codes, plgpu.Layout.WGMMA)
    if halves == 2:
        # Mosaic shifts no bytes: a high nibble with its first bit turned is, as a signed byte, 16 times its value.
        low, high = codes & 15, (codes & 240) ^ 128
        parts = [low.astype(jnp.int8).astype(jnp.bfloat16) - 8, high.astype(jnp.int8).astype(jnp.bfloat16) * (1 / 16)]
    elif codes.dtype == jnp.float8_e4m3fn:
        parts = [codes.astype(jnp.float32).astype(jnp.bfloat16)]  # Mosaic has no other way
    else:
        parts = [codes.astype(jnp.bfloat16)]
    for stage, part in zip(stages, parts, strict=bool(stages)):
        stage[...] = part
    if stages:
        plgpu.commit_smem()
    return list(stages) or parts


def _transpose(array: jax.Array, to: Any) -> None:
    """Store the sums of the tensor cores, transposed, in shared memory."""
    if array.dtype == jnp.float32:  # 16 bits are transposed by the store itself
        array = plgpu.layout_cast(array, plgpu.Layout.WGMMA_TRANSPOSED)
    to.transpose((1, 0))[...] = array
    plgpu.commit_smem()


def _by_row(array: jax.Array, scale: jax.Array) -> jax.Array:
    """Each row times its scale."""
    return array * lax.broadcast_in_dim(scale.astype(jnp.float32), array.shape, [0])


def _in_eights(array: jax.Array, axis: int) -> jax.Array:
    """`array` with zeros up to the next multiple of 8 of `axis`, unless it is shorter than that: copies, which are by
    eights, fill with zeros what one alone is short of."""
    short = -array.shape[axis] % 8 if array.shape[axis] > 8 else 0
    return jnp.pad(array, [(0, short if at == axis else 0) for at in range(array.ndim)])


def _tiling(shape: tuple[int, ...], dtype: Any) -> tuple[Any, ...]:
    """The order of a tile in shared memory that the tensor cores read without conflicts of banks."""
    size = jnp.dtype(dtype).itemsize
    swizzle = next(width for width in (128, 64, 32) if shape[-1] * size % width == 0)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def _shared(shape: tuple[int, ...], dtype: Any) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=_tiling(shape, dtype))


def _interpret(interpret: bool) -> Any:
    return plgpu.InterpretGPUParams(out_of_bounds_reads="raise") if interpret else None  # pyright: ignore[reportAttributeAccessIssue]


MATMUL_KERNELS.register("pallas_gpu")(PallasGpuMatmul())
ATTENTION_KERNELS.register("pallas_gpu")(PallasGpuAttention())
