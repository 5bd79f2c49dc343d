"""Attention variants, one file each. A variant turns a layer's choices into an `AttentionShape`; the shape
says which matrices and cache it has and builds the module. To add one, write `<name>.py` here and register
an `AttentionVariant`; `cosearch.testing.check_attention` then tests it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from cosearch.architecture.cache import KVCache
from cosearch.core.candidate import Value
from cosearch.core.registry import Registry
from cosearch.core.space import Knob

Shared = Any
"""What a layer leaves for those above it to attend to as well (`softmax.py`), or None."""


class AttentionModule(Protocol):
    """Attention of one layer, [B batch, T tokens, W width] to [B, T, W]; a flax module. Caches are those of `KVCache`.

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
        """Matrix name to (in, out) features. `output` is the one whose product is added to the residual stream."""
        ...

    @property
    def reads_norm(self) -> tuple[str, ...]:
        """All the matrices that are multiplied with the layer's normalised input, which nothing else reads."""
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

    def reads(self, batch: int, capacity: int) -> Mapping[str, tuple[int, int, int, int]]:
        """What a decode step reads at most of the cached tensors [B, S slots, K heads, D]: its own, or those it shares
        with the layer below."""
        ...

    def multiplications(self, tokens: int, context: int) -> float:
        """How many multiplications the last `tokens` of a sequence of `context` tokens need, but for those of its
        matrices."""
        ...

    def build(self, parts: Mapping[str, Any], cache: KVCache) -> AttentionModule:
        """The module over its matrices (`Linear`) and vectors (`Vector`); `cache` is what it reads and writes."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a layer stands: the model's `width`, which of the layers with the same variant it is (`turn` of `turns`,
    from 0), and what the nearest layer below that attends has chosen."""

    width: int
    turn: int
    turns: int
    below: AttentionShape | None


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
