"""Attention variants, one file each. A variant turns a layer's choices into an `AttentionShape`; the shape
says which matrices and cache it has and builds the module. To add one, write `<name>.py` here and register
an `AttentionVariant`; `cosearch.testing.check_attention` then tests it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from cosearch.core.candidate import Value
from cosearch.core.registry import Registry
from cosearch.core.space import Knob

Shared = Any
"""What a layer leaves for those above it to attend to as well (`softmax.py`), or None."""


class AttentionModule(Protocol):
    """Attention of one layer, [B batch, T tokens, W width] to [B, T, W]. `Cache` is a nested dict of arrays.

    Each method also gets what the layer below shares, and gives what it shares itself: its own, or the same again.
    """

    def score(self, x: jax.Array, cache: None, shared: Shared) -> tuple[jax.Array, None, Shared]:
        """All tokens at once, each seeing itself and those before it."""
        ...

    def prefill(
        self, x: jax.Array, cache: Any, shared: Shared, start: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, Any, Shared]:
        """The tokens at positions `start`… of which the first `length` are real, after those in the cache.

        A prefill at `start` 0 begins a sequence: whatever the cache holds is of another."""
        ...

    def decode_step(
        self, x: jax.Array, cache: Any, shared: Shared, position: jax.Array
    ) -> tuple[jax.Array, Any, Shared]:
        """The one token [B, 1, W] at `position`, after those in the cache."""
        ...


class AttentionShape(Protocol):
    """The sizes of one layer's attention; frozen and hashable."""

    def linears(self, width: int) -> Mapping[str, tuple[int, ...]]:
        """Matrix name to (in, out) features."""
        ...

    @property
    def reads_norm(self) -> tuple[str, ...]:
        """The matrices that read the layer's normalised input, and nothing else does."""
        ...

    def vectors(self) -> Mapping[str, np.ndarray]:
        """What else is learnt, by name: what it starts at, float32."""
        ...

    def cache(self, batch: int, capacity: int) -> Mapping[str, tuple[int, int, int, int]]:
        """Cached tensor with a slot for each token to its logical shape [B, S slots, K heads, D]."""
        ...

    def states(self, batch: int, capacity: int) -> Mapping[str, tuple[int, ...]]:
        """State that is kept beside the slots, to its shape."""
        ...

    def read_slots(self, capacity: int) -> int:
        """How many slots of each cached tensor a decode step reads at most."""
        ...

    def build(self, parts: Mapping[str, nnx.Module], cache: Any) -> nnx.Module:
        """The module over its `Linear`s and `Vector`s; `cache` is the `KVCache` it reads and writes."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a layer stands: the model's `width` and `depth`, its `index`, and what the nearest layer below that
    attends has chosen."""

    width: int
    depth: int = 1
    index: int = 0
    below: AttentionShape | None = None


class AttentionVariant(Protocol):
    """What a file of this folder registers."""

    knobs: Mapping[str, Knob]

    def shape(self, place: Place, choices: Mapping[str, Value]) -> AttentionShape | None:
        """The shape for one layer's choices; None for a block that is skipped.

        Raises:
            Rejected: the choices do not fit each other, or the place.
        """
        ...


ATTENTION: Registry[AttentionVariant] = Registry("attention", __name__)
