"""The sizes of a decoder: what a candidate's architecture choices amount to, layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass

from cosearch.architecture.attention import ATTENTION, AttentionShape
from cosearch.architecture.feedforward import FEEDFORWARD, FeedForwardShape
from cosearch.core.candidate import Choices
from cosearch.core.space import Knob, choice, integer, variant_knobs

VOCABULARY = 256
"""Models read and write bytes."""


@dataclass(frozen=True)
class LayerShape:
    """One layer: attention, then feed-forward, each added to the residual stream."""

    attention: AttentionShape
    feedforward: FeedForwardShape


@dataclass(frozen=True)
class DecoderShape:
    """Embedding, layers and final norm over a residual stream of `width`.

    The embedding is tied: the matrix [width, 256] that gives the logits is also the one that bytes are read by.
    """

    width: int
    layers: tuple[LayerShape, ...]

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike, so that one loop can run them."""
        return len(set(self.layers)) == 1

    def linears(self) -> dict[str, tuple[int, int]]:
        """Every matrix's path to its (in, out) features."""
        found = {}
        for index, layer in enumerate(self.layers):
            for block, shape in (("attention", layer.attention), ("feedforward", layer.feedforward)):
                for name, features in shape.linears(self.width).items():
                    found[f"layers.{index}.{block}.{name}"] = features
        return found | {"embedding": (self.width, VOCABULARY)}

    def norms(self) -> dict[str, tuple[int, float]]:
        """Every norm's path to its size and to what its scales start at."""
        found = {"norm": (self.width, 1.0)}
        for index, layer in enumerate(self.layers):
            found[f"layers.{index}.attention_norm"] = found[f"layers.{index}.feedforward_norm"] = (self.width, 1.0)
            found |= {f"layers.{index}.attention.{name}": sizes for name, sizes in layer.attention.norms().items()}
        return found

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        matrices = sum(rows * columns for rows, columns in self.linears().values())
        return matrices + sum(size for size, _ in self.norms().values())

    @classmethod
    def of(cls, choices: Choices) -> "DecoderShape":
        """Resolve an architecture's choices. A value given by layer is repeated over the depth.

        Raises:
            Rejected: the sizes do not fit each other.
        """
        declared = knobs()
        values = {name: choices.get(name, knob.default) for name, knob in declared.items()}
        width, depth = values["width"], values["depth"]
        assert isinstance(width, int) and isinstance(depth, int)
        layers = []
        for index in range(depth):
            layer = {
                name: value[index % len(value)] if isinstance(value, tuple) and declared[name].per_layer else value
                for name, value in values.items()
            }
            attention = ATTENTION[str(layer["attention"])].shape(width, layer)
            layers.append(LayerShape(attention, FEEDFORWARD[str(layer["feedforward"])].shape(width, layer)))
        return cls(width, tuple(layers))


def knobs() -> Mapping[str, Knob]:
    """The architecture's knobs: its own and those of every registered variant."""
    own = {
        "width": integer(128),
        "depth": integer(3),
        "head_dim": integer(32, per_layer=True),
        "attention": choice("mha", ATTENTION.names, per_layer=True),
        "feedforward": choice("swiglu", FEEDFORWARD.names, per_layer=True),
    }
    return (
        own
        | variant_knobs("architecture.attention", ATTENTION)
        | variant_knobs("architecture.feedforward", FEEDFORWARD)
    )
