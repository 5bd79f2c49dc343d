"""A matrix in any stored format. The format is all that differs between a trained and a served model."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from cosearch.precision import FORMATS


@dataclass(frozen=True)
class MatrixStorage:
    """How matrices are stored (`format`, `layout`) and multiplied (`lowering`)."""

    format: str = "float32"
    layout: str = "in_out"
    lowering: str = "dot"


class Linear(nnx.Module):
    """`x` [..., in] to [..., out], without bias. It is born abstract: its parameters are shapes and dtypes."""

    def __init__(self, rows: int, columns: int, storage: MatrixStorage) -> None:
        self.rows = rows
        self.columns = columns
        self.storage = storage
        spec = FORMATS[storage.format].spec(rows, columns, storage.layout)
        self.stored = nnx.Dict({part: nnx.Param(array) for part, array in spec.items()})

    def __call__(self, x: jax.Array) -> jax.Array:
        storage = self.storage
        return FORMATS[storage.format].matmul(x, self._arrays(), storage.layout, storage.lowering)

    def take(self, indices: jax.Array, dtype: Any) -> jax.Array:
        """The columns [..., in] of the matrix at `indices` [...], one a byte."""
        return FORMATS[self.storage.format].columns(self._arrays(), indices, self.storage.layout, dtype)

    def _arrays(self) -> dict[str, jax.Array]:
        return {part: param[...] for part, param in self.stored.items()}
