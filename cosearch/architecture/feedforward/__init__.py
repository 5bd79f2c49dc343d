"""Feed-forward variants, one file each. A variant turns a layer's choices into a `FeedForwardShape`, which says
which matrices it has and how they act. To add one, write `<name>.py` here and register it.
"""

from collections.abc import Mapping
from typing import Protocol

import jax

from cosearch.architecture.linear import Linear
from cosearch.core.candidate import Value
from cosearch.core.registry import Registry
from cosearch.core.space import Knob


class FeedForwardShape(Protocol):
    """The sizes of one layer's feed-forward block; frozen and hashable."""

    def linears(self, width: int) -> Mapping[str, tuple[int, ...]]:
        """Matrix name to (in, out) features, or to (experts, in, out) of a stack. `down` and `shared_down` are
        those whose products are added to the residual stream."""
        ...

    @property
    def reads_norm(self) -> tuple[str, ...]:
        """All the matrices that are multiplied with the layer's normalised input, which nothing else reads."""
        ...

    def read_fraction(self, name: str, tokens: int) -> float:
        """How much of the matrix, or stack, `name` is read for so many tokens, at most."""
        ...

    def __call__(self, x: jax.Array, linears: Mapping[str, Linear]) -> jax.Array:
        """[..., W width] to [..., W], by the matrices `linears`."""
        ...


class FeedForwardVariant(Protocol):
    """What a file of this folder registers."""

    knobs: Mapping[str, Knob]

    def shape(self, width: int, choices: Mapping[str, Value]) -> FeedForwardShape | None:
        """The shape for one layer's choices, None for a block that is skipped; raises Rejected where they do not
        fit each other."""
        ...


FEEDFORWARD: Registry[FeedForwardVariant] = Registry("feedforward", __name__)
