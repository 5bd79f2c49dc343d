"""The Transformer's own feed-forward, down(gelu(up(x))), with GELU in its tanh approximation (Hendrycks and Gimpel
2016, arXiv:1606.08415, section 2)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax

from cosearch.architecture.feedforward import FEEDFORWARD
from cosearch.architecture.linear import Linear
from cosearch.core.candidate import Value
from cosearch.core.space import Knob, integer


@dataclass(frozen=True)
class GELUShape:
    """`hidden` channels between the two halves."""

    hidden: int
    reads_norm = ("up",)

    def linears(self, width: int) -> Mapping[str, tuple[int, ...]]:
        return {"up": (width, self.hidden), "down": (self.hidden, width)}

    def read_fraction(self, name: str, tokens: int) -> float:
        return 1.0

    def with_hidden(self, hidden: int) -> "GELUShape":
        return replace(self, hidden=hidden)

    def __call__(self, x: jax.Array, linears: Mapping[str, Linear]) -> jax.Array:
        return linears["down"](jax.nn.gelu(linears["up"](x)))


class GELU:
    """`ffn_ratio` times the model's width hidden channels."""

    knobs: Mapping[str, Knob] = {"ffn_ratio": integer(3, per_layer=True)}

    def shape(self, width: int, choices: Mapping[str, Value]) -> GELUShape:
        ratio = choices["ffn_ratio"]
        assert isinstance(ratio, int)
        return GELUShape(ratio * width)


FEEDFORWARD.register("gelu")(GELU())
