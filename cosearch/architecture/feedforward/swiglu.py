"""SwiGLU (Shazeer 2020, arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax

from cosearch.architecture.feedforward import FEEDFORWARD
from cosearch.architecture.linear import Linear
from cosearch.core.candidate import Value
from cosearch.core.space import Knob, integer


@dataclass(frozen=True)
class SwiGLUShape:
    """`hidden` channels between the two halves."""

    hidden: int
    reads_norm = ("gate", "up")

    def linears(self, width: int) -> Mapping[str, tuple[int, ...]]:
        return {"gate": (width, self.hidden), "up": (width, self.hidden), "down": (self.hidden, width)}

    def read_fraction(self, name: str, tokens: int) -> float:
        return 1.0

    def with_hidden(self, hidden: int) -> "SwiGLUShape":
        return replace(self, hidden=hidden)

    def __call__(self, x: jax.Array, linears: Mapping[str, Linear]) -> jax.Array:
        return linears["down"](jax.nn.silu(linears["gate"](x)) * linears["up"](x))


class SwiGLU:
    """`ffn_ratio` times the model's width hidden channels."""

    knobs: Mapping[str, Knob] = {"ffn_ratio": integer(3, per_layer=True)}

    def shape(self, width: int, choices: Mapping[str, Value]) -> SwiGLUShape:
        ratio = choices["ffn_ratio"]
        assert isinstance(ratio, int)
        return SwiGLUShape(ratio * width)


FEEDFORWARD.register("swiglu")(SwiGLU())
