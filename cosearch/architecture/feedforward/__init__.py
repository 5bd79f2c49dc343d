"""Feed-forward variants, one file each. A variant turns a layer's choices into a `FeedForwardShape`, which says
which matrices it has and how they act. To add one, write `<name>.py` here and register it.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import jax

from cosearch.core.candidate import Value
from cosearch.core.registry import Registry
from cosearch.core.space import Knob

Apply = Callable[[jax.Array], jax.Array]


class FeedForwardShape(Protocol):
    """The sizes of one layer's feed-forward block; frozen and hashable."""

    def linears(self, width: int) -> Mapping[str, tuple[int, int]]:
        """Matrix name to (in, out) features."""
        ...

    def __call__(self, x: jax.Array, linears: Mapping[str, Apply]) -> jax.Array:
        """[..., W width] to [..., W], by the matrices `linears`."""
        ...


class FeedForwardVariant(Protocol):
    """What a file of this folder registers."""

    knobs: Mapping[str, Knob]

    def shape(self, width: int, choices: Mapping[str, Value]) -> FeedForwardShape:
        """The shape for one layer's choices; raises Rejected where they do not fit each other."""
        ...


FEEDFORWARD: Registry[FeedForwardVariant] = Registry("feedforward", __name__)
