"""Kernels: products and attention written by hand for a kind of device, beside the ways XLA has of them.

The references are plain JAX: `Format.matmul` by the lowering "dot" (`schedule/matmul.py`) and
`architecture.attention.softmax.attend`. A kernel is another implementation of one of them, known by its name, which is
a value of the schedule's knobs `matmul` and `attention`. It says what it cannot do (`why_not`): the reference then
takes its place. To add one, register it in a module of this package, or in one of your own by an entry point in the
groups `cosearch.matmul_kernel` and `cosearch.attention_kernel`; `cosearch.testing.check_matmul_kernel` and
`check_attention_kernel` then test it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from cosearch.core.registry import Registry

Stored = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Product:
    """`x` [tokens, rows] of `dtype` times a matrix [rows, columns] that is stored in `format` and memory order
    `layout` ("in_out" or "out_in").

    `inputs` is what `x` is rounded to by token before it is multiplied ("as_is": not). `compression` is which of the
    matrix' weights are stored, None for all.
    """

    tokens: int
    rows: int
    columns: int
    format: str
    layout: str
    inputs: str = "as_is"
    dtype: str = "float32"
    compression: Any = None


@dataclass(frozen=True)
class CachedAttention:
    """Queries [batch, heads, head_dim] of `dtype` attend to the first slots of a cache whose keys and values, [batch,
    slots, kv_heads, head_dim], are stored in `format` and in the memory order `layout` ("bshd", "bhsd", "bhds").

    `heads / kv_heads` queries share a key/value head.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    format: str
    layout: str
    dtype: str = "float32"


class MatmulKernel(Protocol):
    """An implementation of `Format.matmul`."""

    platforms: frozenset[str]
    """JAX's names of the kinds of devices that it runs on: "cpu", "gpu", "tpu"."""
    layout: str
    """The memory order of the matrices that it is made for."""

    def why_unavailable(self) -> str | None:
        """Why it cannot be built on this machine (no compiler, no such library); None where it can."""
        ...

    def why_not(self, product: Product) -> str | None:
        """Why it does not do this product; None where it does."""
        ...

    def __call__(self, x: jax.Array, stored: Stored, product: Product) -> jax.Array:
        """`x` [tokens, rows] times the packed matrix: [tokens, columns], in the dtype of `x`, summed in float32."""
        ...


class AttentionKernel(Protocol):
    """An implementation of decode attention over a cache."""

    platforms: frozenset[str]

    def why_unavailable(self) -> str | None:
        """Why it cannot be built on this machine; None where it can."""
        ...

    def why_not(self, attention: CachedAttention) -> str | None:
        """Why it does not do this attention; None where it does."""
        ...

    def __call__(
        self, query_BHD: jax.Array, key: Stored, value: Stored, length: jax.Array, attention: CachedAttention
    ) -> jax.Array:
        """[B, H, D] in the dtype of the queries: softmax attention to the slots below `length` [], which is at least 1,
        with scores scaled by head_dim ** -0.5. `key` and `value` are what `Format.encode` stores, in memory order."""
        ...


MATMUL_KERNELS: Registry[MatmulKernel] = Registry("matmul_kernel", __name__)
ATTENTION_KERNELS: Registry[AttentionKernel] = Registry("attention_kernel", __name__)
