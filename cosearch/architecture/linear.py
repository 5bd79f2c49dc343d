"""A matrix in any stored format, compressed or not: that is all that differs between a trained and a served model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata

from cosearch.core.errors import Rejected
from cosearch.kernels import MATMUL_KERNELS, Product
from cosearch.precision import FORMATS, Format

INDICES = "indices"
"""The part of a compressed matrix that says which weights its values are."""


class Compression(Protocol):
    """Which weights of a matrix are not stored, as a sparsity pattern knows it; frozen and hashable.

    A compressed matrix is a smaller one, [stored in, out], that a format packs like any other, and indices that tell
    for each of its weights which row of the whole matrix [in, out] it is of.
    """

    @property
    def of_groups(self) -> tuple[int, int] | None:
        """(N, M) where N of every M consecutive inputs of each output are stored; None where it is not so."""
        ...

    def why_not(self, rows: int, columns: int) -> str | None:
        """Why a matrix [rows in, columns out] cannot be compressed; None where it can."""
        ...

    def stored_rows(self, rows: int) -> int:
        """How many rows the compressed matrix has."""
        ...

    def indices(self, rows: int, columns: int, layout: str) -> jax.ShapeDtypeStruct:
        """The array of indices, in the order of `layout`."""
        ...

    def compress(
        self, weights: np.ndarray, layout: str, scores: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The compressed matrix [stored in, out] and its indices; the weights left out are those of the least `scores`
        [in, out], or, if there are none, those nearest to zero."""
        ...

    def expand(self, values: np.ndarray, indices: np.ndarray, rows: int, layout: str) -> np.ndarray:
        """The whole matrix [rows, columns] of a compressed one [stored in, out]; zero where nothing is stored."""
        ...

    def dense(self, values: jax.Array, indices: jax.Array, rows: int, layout: str) -> jax.Array:
        """As `expand`, in JAX; `values` and the whole matrix are in the order of `layout`."""
        ...

    def matmul(
        self, x: jax.Array, values: jax.Array, indices: jax.Array, rows: int, layout: str, lowering: str
    ) -> jax.Array:
        """`x` [..., rows] times the matrix, [..., out]; `values` is in the order of `layout`."""
        ...


@dataclass(frozen=True)
class MatrixStorage:
    """How a matrix is stored (`format`, `layout`, `compression`) and multiplied (`lowering`, `inputs`).

    `observed` matrices keep the second moment of what they are multiplied with (`quality/statistics.py`). The compiler
    is told to fuse nothing across the products of `limited` ones.
    """

    format: str = "float32"
    layout: str = "in_out"
    lowering: str = "dot"
    inputs: str = "as_is"
    compression: Compression | None = None
    observed: bool = False
    limited: bool = False

    @property
    def form(self) -> Format:
        return FORMATS[self.format]

    def spec(self, sizes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a matrix of `sizes` [in, out], or of a stack of them [..., in, out].

        Raises:
            Rejected: `why_not` says why there are none.
        """
        self._refuse(sizes)
        *stack, rows, columns = sizes
        parts = self.form.spec(self.stored_rows(rows), columns, self.layout)
        if self.compression is not None:
            parts[INDICES] = self.compression.indices(rows, columns, self.layout)
        return {part: jax.ShapeDtypeStruct((*stack, *one.shape), one.dtype) for part, one in parts.items()}

    def product(self, tokens: int, sizes: tuple[int, int], dtype: str) -> Product:
        """What a kernel is asked for: so many `tokens` of `dtype` times a matrix of `sizes` [in, out]."""
        return Product(tokens, *sizes, self.format, self.layout, self.inputs, dtype, self.compression)

    def stored_rows(self, rows: int) -> int:
        """How many of the rows of a matrix are stored."""
        return rows if self.compression is None else self.compression.stored_rows(rows)

    def bits(self, sizes: tuple[int, ...]) -> int:
        """Stored bits of a matrix of `sizes`, or of a stack of them; two numbers of 4 bits share a byte."""
        return sum(part.size * jax.dtypes.itemsize_bits(part.dtype) for part in self.spec(sizes).values())

    def why_not(self, sizes: tuple[int, ...]) -> str | None:
        """Why a matrix of `sizes` cannot be stored and multiplied so; None where it can."""
        *_, rows, columns = sizes
        if self.compression is not None:
            if why := self.compression.why_not(rows, columns):
                return why
            if self.inputs != "as_is":
                return f"inputs in {self.inputs} are not multiplied with compressed weights"
        why = self.form.why_not(self.stored_rows(rows), columns)
        return why and f"{self.format} does not hold it: {why}"

    def pack(self, weights: np.ndarray, scale: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Store a matrix [..., in, out]; `scale` as in `Format.pack`.

        Raises:
            Rejected: `why_not` speaks, or the format has no place for a value.
        """
        self._refuse(weights.shape)
        if weights.ndim > 2:
            scales = [None] * len(weights) if scale is None else scale
            packed = [self.pack(one, own) for one, own in zip(weights, scales, strict=True)]
            return {part: np.stack([one[part] for one in packed]) for part in packed[0]}
        parts = {}
        if self.compression is not None:
            weights, parts[INDICES] = self.compression.compress(weights, self.layout)
        try:
            parts |= self.form.pack(weights, self.layout, scale)
        except Rejected as rejection:
            raise Rejected(f"{self.format} does not hold it: {rejection}") from None
        return {part: np.ascontiguousarray(array) for part, array in parts.items()}

    def unpack(self, stored: Mapping[str, np.ndarray], sizes: tuple[int, ...]) -> np.ndarray:
        """The matrix of `sizes` [..., in, out] in float64 that the packed arrays stand for."""
        *stack, rows, _ = sizes
        if stack:
            each = [{part: array[i] for part, array in stored.items()} for i in range(len(stored["values"]))]
            return np.stack([self.unpack(one, sizes[1:]) for one in each])
        parts = {part: array for part, array in stored.items() if part != INDICES}
        values = self.form.unpack(parts, self.layout)
        if self.compression is None:
            return values
        return self.compression.expand(values, stored[INDICES], rows, self.layout)

    def multiply(self, x: jax.Array, stored: Mapping[str, jax.Array], sizes: tuple[int, ...]) -> jax.Array:
        """`x` [..., in] times a matrix of `sizes` [..., in, out], of its stored arrays: [..., out] in `x`'s dtype."""
        *_, wide, columns = sizes
        if self.limited:
            out: Any = replace(self, limited=False).multiply(x, stored, sizes)
            return cast(jax.Array, set_xla_metadata(out, FUSE_LIMIT=True))
        if self.lowering in MATMUL_KERNELS:
            rows = x.reshape(-1, x.shape[-1])
            product = self.product(len(rows), (wide, columns), str(x.dtype))
            kernel = MATMUL_KERNELS[self.lowering]
            if kernel.why_not(product) is None:
                return kernel(rows, stored, product).reshape(*x.shape[:-1], -1)
            return replace(self, lowering="dot").multiply(x, stored, sizes)
        if self.compression is None:
            return self.form.matmul(x, stored, self.layout, self.lowering, self.inputs)
        parts = {part: array for part, array in stored.items() if part != INDICES}
        values = self.form.dequantize(parts, self.layout, jnp.promote_types(x.dtype, jnp.float32))
        out = self.compression.matmul(x, values, stored[INDICES], wide, self.layout, self.lowering)
        return out.astype(x.dtype)

    def _refuse(self, sizes: tuple[int, ...]) -> None:
        if why := self.why_not(sizes):
            raise Rejected(why)


class Linear(nnx.Module):
    """`x` [..., in] to [..., out], without bias. It is born abstract: its parameters are shapes and dtypes.

    With sizes [E, in, out] it is a stack of matrices, of which `select` takes one.
    """

    def __init__(self, sizes: tuple[int, ...], storage: MatrixStorage) -> None:
        self.sizes = sizes
        self.storage = storage
        self.stored = nnx.Dict({part: nnx.Param(array) for part, array in storage.spec(sizes).items()})

    def __call__(self, x: jax.Array) -> jax.Array:
        self.observe(x)
        return self.storage.multiply(x, self.arrays(), self.sizes)

    def select(self, index: jax.Array, x: jax.Array) -> jax.Array:
        """`x` times the matrix at `index` [] of the stack; no other is read."""
        one = {
            part: jax.lax.dynamic_index_in_dim(array, index, keepdims=False) for part, array in self.arrays().items()
        }
        return self.storage.multiply(x, one, self.sizes)

    def take(self, indices: jax.Array, dtype: Any) -> jax.Array:
        """The columns [..., in] of the matrix at `indices` [...], one a byte."""
        return self.storage.form.columns(self.arrays(), indices, self.storage.layout, dtype)

    def matrix(self, dtype: Any) -> jax.Array:
        """The matrix [in, out] itself, for products that are not with the input."""
        storage, arrays = self.storage, self.arrays()
        parts = {part: array for part, array in arrays.items() if part != INDICES}
        whole = storage.form.dequantize(parts, storage.layout, dtype)
        if storage.compression is not None:
            whole = storage.compression.dense(whole, arrays[INDICES], self.sizes[-2], storage.layout)
        return whole if storage.layout == "in_out" else whole.T

    def observe(self, x: jax.Array, weights: jax.Array | None = None) -> None:
        """Keep the mean of `x` [..., in] times itself, [in, in], where this matrix is observed.

        In a stack, `weights` [..., E] tells how much each token counts for each of its matrices: [E, in, in].
        """
        if not self.storage.observed:
            return
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        if weights is None:
            self.moment = nnx.Intermediate(rows.T @ rows / len(rows))
        else:
            each = weights.reshape(len(rows), -1).astype(jnp.float32)
            self.moment = nnx.Intermediate(jnp.einsum("te,ti,tj->eij", each, rows, rows) / len(rows))

    def observe_each(self, x: jax.Array, weights: jax.Array) -> None:
        """As `observe`, where each matrix of a stack is multiplied with its own `x` [..., E, in]."""
        if not self.storage.observed:
            return
        rows = x.reshape(-1, *x.shape[-2:]).astype(jnp.float32)
        each = weights.reshape(rows.shape[:2]).astype(jnp.float32)
        self.moment = nnx.Intermediate(jnp.einsum("te,tei,tej->eij", each, rows, rows) / len(rows))

    def arrays(self) -> dict[str, jax.Array]:
        """The stored parts."""
        return {part: param[...] for part, param in self.stored.items()}
