"""Attention variants, one file each. A variant turns a layer's choices into an `AttentionShape`; the shape
says which matrices and cache it has and builds the module. To add one, write `<name>.py` here and register
an `AttentionVariant`; `cosearch.testing.check_attention` then tests it.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
from flax import nnx

from cosearch.core.candidate import Value
from cosearch.core.registry import Registry
from cosearch.core.space import Knob


class AttentionModule(Protocol):
    """Attention of one layer, [B batch, T tokens, W width] to [B, T, W]. `Cache` is a nested dict of arrays."""

    def score(self, x: jax.Array) -> jax.Array:
        """All tokens at once, each seeing itself and those before it."""
        ...

    def prefill(self, x: jax.Array, cache: Any, start: jax.Array, length: jax.Array) -> tuple[jax.Array, Any]:
        """The tokens at positions `start`… of which the first `length` are real, after those in the cache."""
        ...

    def decode_step(self, x: jax.Array, cache: Any, position: jax.Array) -> tuple[jax.Array, Any]:
        """The one token [B, 1, W] at `position`, after those in the cache."""
        ...


class AttentionShape(Protocol):
    """The sizes of one layer's attention; frozen and hashable."""

    def linears(self, width: int) -> Mapping[str, tuple[int, int]]:
        """Matrix name to (in, out) features."""
        ...

    def norms(self) -> Mapping[str, tuple[int, float]]:
        """Norm name to its size and to what its scales start at."""
        ...

    def cache(self, batch: int, capacity: int) -> Mapping[str, tuple[int, int, int, int]]:
        """Cached tensor to its logical shape [B, S slots, K heads, D]."""
        ...

    def build(self, modules: Mapping[str, nnx.Module], cache: Any) -> nnx.Module:
        """The module over its matrices and norms; `cache` is the `KVCache` it reads and writes."""
        ...


class AttentionVariant(Protocol):
    """What a file of this folder registers."""

    knobs: Mapping[str, Knob]

    def shape(self, width: int, choices: Mapping[str, Value]) -> AttentionShape:
        """The shape for one layer's choices.

        Raises:
            Rejected: the choices do not fit each other.
        """
        ...


ATTENTION: Registry[AttentionVariant] = Registry("attention", __name__)
