"""The KV cache: where keys and values of past tokens are kept, in what format and memory order.

A layer's cache is a nested dict: tensor name ("key") to the arrays of its stored form ("values", "scale").
Logically each array is [B, S slots, K heads, …]; `layout` gives the order in which its axes lie in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from cosearch.precision import FORMATS, Format

_ORDERS = {"bshd": (0, 1, 2, 3), "bhsd": (0, 2, 1, 3), "bhds": (0, 2, 3, 1)}
"""Layout to the logical axes [B, S, K, D] in memory order."""


@dataclass(frozen=True)
class KVCache:
    """How caches are stored and read: `format`, `layout`, the dtype that attention computes in, and the
    lowering of decode attention (`dot` or `multiply_reduce`)."""

    format: str = "float32"
    layout: str = "bshd"
    dtype: str = "float32"
    lowering: str = "dot"

    def spec(self, tensors: Mapping[str, tuple[int, int, int, int]]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """The arrays of a layer's cache whose tensors have these logical shapes [B, S, K, D]."""
        stored = {}
        for name, shape in tensors.items():
            arrays = jax.eval_shape(self._format.encode, jax.ShapeDtypeStruct(shape, self.dtype))
            stored[name] = {
                part: jax.ShapeDtypeStruct(tuple(array.shape[axis] for axis in self._order), array.dtype)
                for part, array in arrays.items()
            }
        return stored

    def slots(self, cache: Mapping[str, Any], name: str) -> int:
        """How many tokens the tensor `name` has room for."""
        return next(iter(cache[name].values())).shape[self._order.index(1)]

    def load(self, cache: Mapping[str, Any], name: str) -> jax.Array:
        """The whole tensor [B, S, K, D] in the compute dtype."""
        inverse = [self._order.index(axis) for axis in range(4)]
        return self._format.decode({part: array.transpose(inverse) for part, array in cache[name].items()}, self.dtype)

    def round_trip(self, x_BTKD: jax.Array) -> jax.Array:
        """What attention reads back of `x` once it is in the cache."""
        return self._format.decode(self._format.encode(x_BTKD), self.dtype)

    def append(self, cache: dict, tensors: Mapping[str, jax.Array], slot: jax.Array) -> dict:
        """Write one token [B, 1, K, D] of each tensor to `slot`."""
        axis = self._order.index(1)
        return {
            name: {
                part: jax.lax.dynamic_update_slice_in_dim(cache[name][part], new.transpose(self._order), slot, axis)
                for part, new in self._format.encode(x).items()
            }
            for name, x in tensors.items()
        }

    def write(self, cache: dict, tensors: Mapping[str, jax.Array], slots_T: jax.Array) -> dict:
        """Write tokens [B, T, K, D] to their slots; a slot past the end is not written."""
        where = (slice(None),) * self._order.index(1) + (slots_T,)
        return {
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
        return _ORDERS[self.layout]


def zeros(spec: Any) -> Any:
    """An empty cache."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), spec)
