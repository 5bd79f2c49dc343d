"""N:M sparsity: of every M consecutive inputs of each output, N weights are stored (Mishra et al. 2021,
arXiv:2104.08378), with the place of each in its group in 2 bits (M = 4) or 4 bits (M = 8).

Shape suffixes: N and M as above, G groups of M inputs, Q places that share a byte, B = G / Q bytes, O outputs.

The stored matrix is [N G, O]: first the first weight that stays of every group, then the second of every group. Byte
[n B + b] of the indices holds the places of weight n of the groups b, b + B, b + 2 B, ..., from its low bits up. So
values are [N, Q, B, O] and indices [N, B, O], and one shift along Q, without any gather, opens them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cosearch.core.candidate import Value
from cosearch.core.space import choice
from cosearch.schedule.matmul import MOST_ROWS, contract
from cosearch.sparsity import PATTERNS
from cosearch.sparsity.compressed import CompressedPattern
from cosearch.sparsity.criteria import CRITERION, largest, sparsegpt


@dataclass(frozen=True)
class NMCompression:
    """`kept` of every `group` consecutive inputs are stored."""

    kept: int
    group: int

    @property
    def of_groups(self) -> tuple[int, int]:
        return self.kept, self.group

    @property
    def _bits(self) -> int:
        return 2 if self.group == 4 else 4

    @property
    def _per_byte(self) -> int:
        return 8 // self._bits

    def why_not(self, rows: int, columns: int) -> str | None:
        if rows % self.group:
            return f"groups of {self.group} do not divide {rows} inputs"
        if rows % (self.group * self._per_byte):
            return f"{self._per_byte} groups share their bytes of indices, and {rows // self.group} groups do not fit"
        return None

    def stored_rows(self, rows: int) -> int:
        return rows // self.group * self.kept

    def indices(self, rows: int, columns: int, layout: str) -> jax.ShapeDtypeStruct:
        stored = self.stored_rows(rows) // self._per_byte
        return jax.ShapeDtypeStruct((stored, columns) if layout == "in_out" else (columns, stored), jnp.uint8)

    def compress(
        self, weights: np.ndarray, layout: str, scores: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        columns = weights.shape[1]
        groups_GMO = weights.reshape(-1, self.group, columns)
        scores = np.abs(weights) if scores is None else scores
        places_GNO = largest(scores.reshape(groups_GMO.shape), self.kept)
        values_GNO = np.take_along_axis(groups_GMO, places_GNO, axis=1)
        places_NQBO = places_GNO.transpose(1, 0, 2).reshape(self.kept, self._per_byte, -1, columns)
        shifted = places_NQBO << (np.arange(self._per_byte) * self._bits)[:, None, None]
        indices = shifted.sum(axis=1).astype(np.uint8).reshape(-1, columns)
        values = values_GNO.transpose(1, 0, 2).reshape(-1, columns)
        return values, indices if layout == "in_out" else indices.T

    def expand(self, values: np.ndarray, indices: np.ndarray, rows: int, layout: str) -> np.ndarray:
        columns = values.shape[1]
        bytes_NBO = (indices if layout == "in_out" else indices.T).reshape(self.kept, 1, -1, columns)
        shift = (np.arange(self._per_byte) * self._bits)[:, None, None]
        places_NGO = (bytes_NBO >> shift & 2**self._bits - 1).reshape(self.kept, -1, columns)
        groups_GMO = np.zeros((rows // self.group, self.group, columns), values.dtype)
        values_NGO = values.reshape(places_NGO.shape)
        np.put_along_axis(groups_GMO, places_NGO.transpose(1, 0, 2), values_NGO.transpose(1, 0, 2), axis=1)
        return groups_GMO.reshape(rows, columns)

    def dense(self, values: jax.Array, indices: jax.Array, rows: int, layout: str) -> jax.Array:
        spread = self._spread_weights(*self._open(values, indices, layout), layout)
        if layout == "in_out":
            return spread.reshape(self.group, -1, spread.shape[1]).swapaxes(0, 1).reshape(rows, -1)
        return spread.reshape(len(spread), self.group, -1).swapaxes(1, 2).reshape(-1, rows)

    def matmul(
        self, x: jax.Array, values: jax.Array, indices: jax.Array, rows: int, layout: str, lowering: str
    ) -> jax.Array:
        # Inputs in the order [M, G], in which each place of all groups is one slab.
        x_RMG = x.reshape(-1, rows // self.group, self.group).swapaxes(1, 2)
        values, places = self._open(values, indices, layout)
        if lowering == "multiply_reduce" and len(x_RMG) <= MOST_ROWS:
            out = self._pick_inputs(x_RMG, values, places, layout)
        else:
            # Not `dense`: to sort the matrix by inputs made one row by 1024 x 1024 from [out, in] 0.65 ms, not 0.31 ms.
            spread = self._spread_weights(values, places, layout)
            out = contract(x_RMG.reshape(-1, rows), spread, layout, "dot", out_dtype=values.dtype)
        return out.reshape(*x.shape[:-1], -1)

    def _open(self, values: jax.Array, indices: jax.Array, layout: str) -> tuple[jax.Array, jax.Array]:
        """The values and the place of each in its group, both [N, Q, B, O] or [O, N, Q, B]."""
        # In int32: shifting bytes by different amounts is slower (1024 x 1024 from [out, in], 0.58 ms against 0.36 ms).
        indices = indices.astype(jnp.int32)
        shift = np.arange(self._per_byte, dtype=np.int32) * self._bits
        if layout == "in_out":
            values = values.reshape(self.kept, self._per_byte, -1, values.shape[1])
            bytes_ = indices.reshape(self.kept, 1, -1, indices.shape[1])
            shift = shift[:, None, None]
        else:
            values = values.reshape(len(values), self.kept, self._per_byte, -1)
            bytes_ = indices.reshape(len(indices), self.kept, 1, -1)
            shift = shift[:, None]
        return values, bytes_ >> shift & 2**self._bits - 1

    def _pick_inputs(self, x_RMG: jax.Array, values: jax.Array, places: jax.Array, layout: str) -> jax.Array:
        """Each stored weight picks its input among the M of its group, by comparing; the products are summed."""
        # Without the barrier XLA fuses what computes `x` into the loop and runs it once for every output.
        x_RMG = jax.lax.optimization_barrier(x_RMG.astype(values.dtype))

        def row(x_MG: jax.Array) -> jax.Array:
            x_MQB = x_MG.reshape(self.group, self._per_byte, -1)
            each = x_MQB[..., None] if layout == "in_out" else x_MQB
            picked = each[0]
            for place in range(1, self.group):
                picked = jnp.where(places == place, each[place], picked)
            return (picked * values).sum(axis=(0, 1, 2) if layout == "in_out" else (1, 2, 3))

        # An axis of size 1 would make the CPU's loop slow (`schedule/matmul.py`).
        return row(x_RMG[0])[None] if len(x_RMG) == 1 else jax.vmap(row)(x_RMG)

    def _spread_weights(self, values: jax.Array, places: jax.Array, layout: str) -> jax.Array:
        """The whole matrix, its inputs in the order [M, G]."""
        axis = 0 if layout == "in_out" else 1
        each = [
            (
                jax.lax.index_in_dim(values, n, axis, keepdims=False),
                jax.lax.index_in_dim(places, n, axis, keepdims=False),
            )
            for n in range(self.kept)
        ]
        slots = [sum(jnp.where(at == place, value, 0) for value, at in each) for place in range(self.group)]
        dense = jnp.stack(slots, axis)  # pyright: ignore[reportArgumentType]
        return dense.reshape(-1, values.shape[-1]) if layout == "in_out" else dense.reshape(len(values), -1)


def _compression(choices: Mapping[str, Value]) -> NMCompression:
    return NMCompression(*map(int, str(choices["n_m"]).split(":")))


def _sparsegpt(matrix: np.ndarray, moment: np.ndarray, choices: Mapping[str, Value]) -> np.ndarray:
    compression = _compression(choices)
    return sparsegpt(matrix, moment, compression.kept, compression.group)


PATTERNS.register("n_m")(
    CompressedPattern({"n_m": choice("2:4", lambda: ("2:4", "4:8", "1:4")), **CRITERION}, _compression, _sparsegpt)
)
"""`n_m` is how many of how many stay, as "2:4"."""
