"""Block sparsity: a matrix is tiles of `block` x `block`, and every block of outputs keeps equally many blocks of
inputs (Gray et al. 2017, "GPU kernels for block-sparse weights"; the even share is what keeps the product regular).

Shape suffixes: I blocks of inputs, J blocks of outputs, K kept for each J, C = `block` inputs or outputs in one.

The stored matrix is [K C, J C], indices are [K, J], ascending along K. A product of few rows gathers the blocks of its
input, whole ones, and reads no weight that is not stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cosearch.core.candidate import Value
from cosearch.core.space import fraction, integer, whole_part
from cosearch.schedule.matmul import MOST_ROWS, contract, multiply_reduce
from cosearch.sparsity import PATTERNS
from cosearch.sparsity.compressed import CompressedPattern
from cosearch.sparsity.criteria import CRITERION, largest, refuse_sparsegpt


@dataclass(frozen=True)
class BlockCompression:
    """`kept` is the fraction of blocks that are stored, `block` how many inputs and outputs one has."""

    block: int
    kept: float

    @property
    def of_groups(self) -> None:
        return None

    def why_not(self, rows: int, columns: int) -> str | None:
        if rows % self.block or columns % self.block:
            return f"blocks of {self.block} do not divide {rows} inputs and {columns} outputs"
        blocks = rows // self.block
        if whole_part(blocks, self.kept) is None:
            return f"{self.kept:g} of {blocks} blocks of {self.block} inputs is no whole number of them"
        return None

    def stored_rows(self, rows: int) -> int:
        return round(rows // self.block * self.kept) * self.block

    def indices(self, rows: int, columns: int, layout: str) -> jax.ShapeDtypeStruct:
        sizes = self.stored_rows(rows) // self.block, columns // self.block
        return jax.ShapeDtypeStruct(sizes if layout == "in_out" else sizes[::-1], jnp.uint16)

    def compress(
        self, weights: np.ndarray, layout: str, scores: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of a block, the sum of its weights' scores counts."""
        scores = np.abs(weights, dtype=np.float64) if scores is None else scores
        blocks_KJ = largest(self._tiles(scores).sum(axis=(1, 3)), self.stored_rows(len(weights)) // self.block)
        tiles_ICJC = self._tiles(weights)
        kept_KCJC = np.take_along_axis(tiles_ICJC, blocks_KJ[:, None, :, None], axis=0)
        indices = blocks_KJ.astype(np.uint16)
        return kept_KCJC.reshape(-1, weights.shape[1]), indices if layout == "in_out" else indices.T

    def expand(self, values: np.ndarray, indices: np.ndarray, rows: int, layout: str) -> np.ndarray:
        blocks_KJ = (indices if layout == "in_out" else indices.T).astype(np.int64)
        tiles_ICJC = self._tiles(np.zeros((rows, values.shape[1]), values.dtype))
        np.put_along_axis(tiles_ICJC, blocks_KJ[:, None, :, None], self._tiles(values), axis=0)
        return tiles_ICJC.reshape(rows, -1)

    def dense(self, values: jax.Array, indices: jax.Array, rows: int, layout: str) -> jax.Array:
        blocks_JK = (indices.T if layout == "in_out" else indices).astype(jnp.int32)
        many, kept = blocks_JK.shape
        whole, size = rows // self.block, self.block
        each = jnp.arange(many)[:, None]
        if layout == "in_out":
            tiles_JKCC = values.reshape(kept, size, many, size).transpose(2, 0, 1, 3)
            places = jnp.zeros((whole, size, many, size), values.dtype).at[blocks_JK, :, each]
        else:
            tiles_JKCC = values.reshape(many, size, kept, size).transpose(0, 2, 1, 3)
            places = jnp.zeros((many, size, whole, size), values.dtype).at[each, :, blocks_JK]
        tiles = places.set(tiles_JKCC, mode="promise_in_bounds", unique_indices=True)
        return tiles.reshape(rows, -1) if layout == "in_out" else tiles.reshape(-1, rows)

    def matmul(
        self, x: jax.Array, values: jax.Array, indices: jax.Array, rows: int, layout: str, lowering: str
    ) -> jax.Array:
        x_RI = x.reshape(-1, rows)
        # The gathered inputs of many rows would be larger than the matrix: 40 rows by 1024 x 1024 took 8 ms with them
        # on 2 cores, and 0.5 ms to spread the blocks and 1.1 ms to multiply.
        if len(x_RI) > MOST_ROWS:
            out = contract(x_RI, self.dense(values, indices, rows, layout), layout, "dot", out_dtype=values.dtype)
        else:
            out = self._gather_inputs(x_RI, values, indices, layout, lowering)
        return out.reshape(*x.shape[:-1], -1)

    def _gather_inputs(
        self, x_RI: jax.Array, values: jax.Array, indices: jax.Array, layout: str, lowering: str
    ) -> jax.Array:
        blocks_JK = (indices.T if layout == "in_out" else indices).astype(jnp.int32)
        picked = x_RI.reshape(len(x_RI), -1, self.block).at[:, blocks_JK].get(mode="promise_in_bounds")
        picked = picked.reshape(len(x_RI), len(blocks_JK), -1)  # [R, J, K C]
        if layout == "in_out":
            tiles, subscripts = values.reshape(len(values), -1, self.block), "rji,ijo->rjo"
        else:
            tiles, subscripts = values.reshape(-1, self.block, values.shape[1]), "rji,joi->rjo"
        if lowering == "multiply_reduce":
            return multiply_reduce(subscripts, picked, tiles)
        return jnp.einsum(subscripts, picked, tiles.astype(x_RI.dtype), preferred_element_type=values.dtype)

    def _tiles(self, matrix: np.ndarray) -> np.ndarray:
        rows, columns = matrix.shape
        return matrix.reshape(rows // self.block, self.block, columns // self.block, self.block)


def _compression(choices: Mapping[str, Value]) -> BlockCompression:
    refuse_sparsegpt(choices, "blocks")
    block, kept = choices["block"], choices["blocks_kept"]
    assert isinstance(block, int) and isinstance(kept, int | float)
    return BlockCompression(block, kept)


PATTERNS.register("block")(
    CompressedPattern({"block": integer(16), "blocks_kept": fraction(0.5), **CRITERION}, _compression)
)
"""`block` is a block's side, `blocks_kept` the fraction of input blocks that each block of outputs keeps."""
