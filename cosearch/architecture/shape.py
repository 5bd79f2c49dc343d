"""The sizes of a decoder: what a candidate's architecture choices amount to, layer by layer."""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from cosearch.architecture.attention import ATTENTION, AttentionShape, Place
from cosearch.architecture.feedforward import FEEDFORWARD, FeedForwardShape
from cosearch.architecture.linear import Compression
from cosearch.core.candidate import Choices, Value
from cosearch.core.errors import Rejected
from cosearch.core.space import Knob, choice, fraction, integer, variant_knobs

VOCABULARY = 256
"""Models read and write bytes."""

EMBEDDING = "embedding"
"""The path of the tied embedding."""


WRITES_RESIDUAL = (".output", ".down", ".shared_down")
"""The matrices whose products are added to the residual stream."""

DECIDES = (".router", ".beta", ".decay")
"""Matrices with one column for each expert or head: few weights, that decide much. They are never compressed, and
never multiplied with rounded inputs."""

ABSORBED = (".key_up", ".value_up")
"""Matrices that a decode step multiplies with something else than scoring does, so that rounded inputs would make two
different models."""


@dataclass(frozen=True)
class LayerShape:
    """One layer: attention, then feed-forward, each added to the residual stream; None is a block that is skipped."""

    attention: AttentionShape | None
    feedforward: FeedForwardShape | None

    def blocks(self) -> Iterator[tuple[str, AttentionShape | FeedForwardShape]]:
        """The blocks that are there, by name."""
        if self.attention is not None:
            yield "attention", self.attention
        if self.feedforward is not None:
            yield "feedforward", self.feedforward


@dataclass(frozen=True)
class DecoderShape:
    """Embedding, layers and final norm over a residual stream of `width`.

    The embedding is tied: the matrix [width, 256] that gives the logits is also the one that bytes are read by.
    `compression` is what the layers' matrices are stored by, but for the smallest; the embedding is always whole.
    """

    width: int
    layers: tuple[LayerShape, ...]
    compression: Compression | None = None

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike, so that one loop can run them."""
        return len(set(self.layers)) == 1

    def linears(self) -> dict[str, tuple[int, ...]]:
        """Every matrix's path to its (in, out) features, or a stack's to its (experts, in, out)."""
        found = {}
        for index, layer in enumerate(self.layers):
            for block, shape in layer.blocks():
                for name, sizes in shape.linears(self.width).items():
                    found[f"layers.{index}.{block}.{name}"] = sizes
        return found | {EMBEDDING: (self.width, VOCABULARY)}

    def vectors(self) -> dict[str, np.ndarray]:
        """Every norm's and small parameter's path to what it starts at."""
        found = {"norm": np.ones(self.width, np.float32)}
        for index, layer in enumerate(self.layers):
            for block, _ in layer.blocks():
                found[f"layers.{index}.{block}_norm"] = np.ones(self.width, np.float32)
            if layer.attention is not None:
                found |= {f"layers.{index}.attention.{name}": one for name, one in layer.attention.vectors().items()}
        return found

    def compression_of(self, path: str) -> Compression | None:
        """How the matrix at `path` is compressed."""
        return None if path == EMBEDDING or path.endswith(DECIDES) else self.compression

    @functools.cached_property
    def parameters(self) -> int:
        """How many weights are stored."""
        count = sum(vector.size for vector in self.vectors().values())
        for path, (*stack, rows, columns) in self.linears().items():
            compression = self.compression_of(path)
            stored = compression.stored_rows(rows) if compression else rows
            count += math.prod(stack) * stored * columns
        return count

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
        for name, value in values.items():
            if isinstance(value, tuple) and len(value) > depth:
                raise Rejected(f"{name} is given for {len(value)} layers, and there are {depth}")
        each = [{name: _at(index, value, declared[name]) for name, value in values.items()} for index in range(depth)]
        variants = [str(layer["attention"]) for layer in each]
        layers: list[LayerShape] = []
        below = None
        for index, (layer, variant) in enumerate(zip(each, variants, strict=True)):
            place = Place(width, variants[:index].count(variant), variants.count(variant), below)
            try:
                attention = ATTENTION[variant].shape(place, layer)
                feedforward = FEEDFORWARD[str(layer["feedforward"])].shape(width, layer)
            except Rejected as rejection:
                raise Rejected(f"layer {index}: {rejection}") from None
            if attention is None and feedforward is None:
                raise Rejected(f"layer {index} has neither attention nor feed-forward: a smaller depth says the same")
            layers.append(LayerShape(attention, feedforward))
            below = attention or below
        if below is None:
            raise Rejected("no layer attends, so no token would see another")
        return cls(width, tuple(layers))


def _at(layer: int, value: Value, knob: Knob) -> Value:
    return value[layer % len(value)] if isinstance(value, tuple) and knob.per_layer else value


def knobs() -> Mapping[str, Knob]:
    """The architecture's knobs: its own and those of every registered variant."""
    own = {
        "width": integer(128),
        "depth": integer(3),
        "head_dim": integer(32, per_layer=True),
        "heads_ratio": fraction(1.0, per_layer=True),
        "attention": choice("mha", ATTENTION.names, per_layer=True),
        "feedforward": choice("swiglu", FEEDFORWARD.names, per_layer=True),
    }
    return (
        own
        | variant_knobs("architecture.attention", ATTENTION)
        | variant_knobs("architecture.feedforward", FEEDFORWARD)
    )
