"""The cache: what a layer keeps of past tokens, in what format and memory order.

A layer's cache is a nested dict: tensor name ("key") to the arrays of its stored form ("values", "scale").
Tensors with a slot for each token are logically [B, S slots, K heads, …] and stored in the cache's format; `layout`
gives the order in which their axes lie in memory. States, which are as large for any number of tokens (a recurrence's,
a sum's), are kept as they are, in at least float32.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from cosearch.core.errors import Rejected
from cosearch.precision import FORMATS, Format

ORDERS = {"bshd": (0, 1, 2, 3), "bhsd": (0, 2, 1, 3), "bhds": (0, 2, 3, 1)}
"""Layout to the logical axes [B, S, K, D] in memory order."""

Slotted = Mapping[str, tuple[int, int, int, int]]
"""Tensor name to its logical shape [B, S, K, D]."""
States = Mapping[str, tuple[int, ...]]
"""State name to its shape."""


@dataclass(frozen=True)
class KVCache:
    """How caches are stored and read: `format`, `layout`, the dtype that attention computes in, and the
    lowering of decode attention, or the kernel that runs it."""

    format: str = "float32"
    layout: str = "bshd"
    dtype: str = "float32"
    lowering: str = "dot"

    @property
    def state_dtype(self) -> Any:
        """The dtype of states."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def spec(self, tensors: Slotted, states: States) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """The arrays of a layer's cache."""
        stored = {}
        for name, shape in tensors.items():
            arrays = jax.eval_shape(self._format.encode, jax.ShapeDtypeStruct(shape, self.dtype))
            stored[name] = {
                part: jax.ShapeDtypeStruct(tuple(array.shape[axis] for axis in self._order), array.dtype)
                for part, array in arrays.items()
            }
        return stored | {name: {"values": jax.ShapeDtypeStruct(s, self.state_dtype)} for name, s in states.items()}

    def slots(self, cache: Mapping[str, Any], name: str) -> int:
        """How many tokens the tensor `name` has room for."""
        return next(iter(cache[name].values())).shape[self._order.index(1)]

    def load(self, cache: Mapping[str, Any], name: str) -> jax.Array:
        """The whole tensor [B, S, K, D] in the compute dtype."""
        inverse = [self._order.index(axis) for axis in range(4)]
        return self._format.decode({part: array.transpose(inverse) for part, array in cache[name].items()}, self.dtype)

    def load_blocks(self, cache: Mapping[str, Any], name: str, blocks_BKN: jax.Array, size: int) -> jax.Array:
        """The slots of some blocks of `size`, chosen for each sequence and head: [B, N * size, K, D].

        No other slot is read.
        """
        slots = (blocks_BKN[..., None] * size + jnp.arange(size)).reshape(*blocks_BKN.shape[:2], -1)  # [B, K, N * size]
        inverse = [self._order.index(axis) for axis in range(4)]
        taken = {}
        for part, array in cache[name].items():
            logical = array.transpose(inverse)
            batch = jnp.arange(logical.shape[0])[:, None, None]
            head = jnp.arange(logical.shape[2])[None, :, None]
            taken[part] = logical[batch, slots, head].transpose(0, 2, 1, 3)
        return self._format.decode(taken, self.dtype)

    def round_trip(self, x_BTKD: jax.Array) -> jax.Array:
        """What attention reads back of `x` once it is in the cache; its gradient passes straight through, since that
        of rounding is zero (Bengio et al. 2013, arXiv:1308.3432)."""
        return straight_through(x_BTKD, self._format.decode(self._format.encode(x_BTKD), self.dtype))

    def append(self, cache: dict, tensors: Mapping[str, jax.Array], slot: jax.Array) -> dict:
        """Write one token [B, 1, K, D] of each tensor to `slot`."""
        axis = self._order.index(1)
        return cache | {
            name: {
                part: jax.lax.dynamic_update_slice_in_dim(cache[name][part], new.transpose(self._order), slot, axis)
                for part, new in self._format.encode(x).items()
            }
            for name, x in tensors.items()
        }

    def write(self, cache: dict, tensors: Mapping[str, jax.Array], slots_T: jax.Array) -> dict:
        """Write tokens [B, T, K, D] to their slots; a slot past the end is not written."""
        where = (slice(None),) * self._order.index(1) + (slots_T,)
        return cache | {
            name: {
                part: cache[name][part].at[where].set(new.transpose(self._order), mode="drop")
                for part, new in self._format.encode(x).items()
            }
            for name, x in tensors.items()
        }

    @property
    def _format(self) -> Format:
        return FORMATS[self.format]

    @property
    def _order(self) -> tuple[int, ...]:
        return ORDERS[self.layout]


@functools.cache
def why_not(name: str, size: int) -> str | None:
    """Why vectors of `size` numbers cannot be cached in the format `name`; None where they can."""
    try:
        jax.eval_shape(FORMATS[name].encode, jax.ShapeDtypeStruct((size,), jnp.float32))
    except Rejected as rejection:
        return str(rejection)
    return None


@jax.custom_jvp
def straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, with the gradient of `x`."""
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0].astype(primals[1].dtype)


def zeros(spec: Any) -> Any:
    """An empty cache."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), spec)
