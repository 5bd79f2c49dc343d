"""Feed-forward by two halves with channels between them, which `swiglu` and `gelu` are shapes of."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax

from cosearch.architecture.linear import Linear
from cosearch.core.candidate import Value
from cosearch.core.space import Knob, integer


@dataclass(frozen=True)
class MLPShape:
    """`hidden` channels between the two halves; in a `gated` one a second matrix says how much of each passes."""

    hidden: int
    gated: bool

    @property
    def reads_norm(self) -> tuple[str, ...]:
        return ("gate", "up") if self.gated else ("up",)

    def linears(self, width: int) -> Mapping[str, tuple[int, ...]]:
        return {**dict.fromkeys(self.reads_norm, (width, self.hidden)), "down": (self.hidden, width)}

    def read_fraction(self, name: str, tokens: int) -> float:
        return 1.0

    def __call__(self, x: jax.Array, linears: Mapping[str, Linear]) -> jax.Array:
        up = linears["up"](x)
        return linears["down"](jax.nn.silu(linears["gate"](x)) * up if self.gated else jax.nn.gelu(up))


class MLP:
    """`ffn_ratio` times the model's width hidden channels."""

    knobs: Mapping[str, Knob] = {"ffn_ratio": integer(3, per_layer=True)}

    def __init__(self, gated: bool) -> None:
        self.gated = gated

    def shape(self, width: int, choices: Mapping[str, Value]) -> MLPShape:
        ratio = choices["ffn_ratio"]
        assert isinstance(ratio, int)
        return MLPShape(ratio * width, self.gated)
