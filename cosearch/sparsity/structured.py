"""Whole attention heads and feed-forward channels are removed, so that the matrices are really smaller.

A unit goes by the magnitude of its weights: the sum of their squares, each matrix relative to its mean square
(the structured form of magnitude pruning, Li et al. 2017, arXiv:1608.08710). Query heads that share a
key/value head go or stay together; under a single key/value head, query heads go one by one.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.architecture.feedforward.swiglu import SwiGLUShape
from cosearch.architecture.shape import DecoderShape, LayerShape
from cosearch.core.candidate import Value
from cosearch.core.errors import Rejected
from cosearch.core.space import Knob, fraction
from cosearch.sparsity import PATTERNS


class Structured:
    """`heads_kept` and `channels_kept` are the fractions that stay in every layer."""

    knobs: Mapping[str, Knob] = {"heads_kept": fraction(0.5), "channels_kept": fraction(0.5)}

    def shape(self, shape: DecoderShape, choices: Mapping[str, Value]) -> DecoderShape:
        heads, channels = choices["heads_kept"], choices["channels_kept"]
        assert isinstance(heads, int | float) and isinstance(channels, int | float)
        if heads == channels == 1:
            raise Rejected("heads_kept and channels_kept of 1 take nothing away: that is the pattern 'dense'")
        return replace(shape, layers=tuple(_thinner(layer, heads, channels) for layer in shape.layers))

    def prune(
        self, weights: Mapping[str, np.ndarray], shape: DecoderShape, choices: Mapping[str, Value]
    ) -> dict[str, np.ndarray]:
        pruned = dict(weights)
        left = self.shape(shape, choices)
        for index, (before, after) in enumerate(zip(shape.layers, left.layers, strict=True)):
            attention, feedforward = f"layers.{index}.attention.", f"layers.{index}.feedforward."
            assert isinstance(before.attention, SoftmaxShape) and isinstance(after.attention, SoftmaxShape)
            assert isinstance(before.feedforward, SwiGLUShape) and isinstance(after.feedforward, SwiGLUShape)
            shared = before.attention.kv_heads > 1
            units, kept = (
                (before.attention.kv_heads, after.attention.kv_heads)
                if shared
                else (before.attention.heads, after.attention.heads)
            )
            columns = ("query", "key", "value") if shared else ("query",)
            _keep_units(pruned, [attention + name for name in columns], attention + "output", units, kept)
            units, kept = before.feedforward.hidden, after.feedforward.hidden
            _keep_units(pruned, [feedforward + "gate", feedforward + "up"], feedforward + "down", units, kept)
        return pruned


def _thinner(layer: LayerShape, heads_kept: float, channels_kept: float) -> LayerShape:
    attention, feedforward = layer.attention, layer.feedforward
    if not isinstance(attention, SoftmaxShape) or not isinstance(feedforward, SwiGLUShape):
        raise Rejected("structured sparsity knows the heads of softmax attention and the channels of SwiGLU only")
    if attention.kv_heads > 1:
        groups = _part(attention.kv_heads, heads_kept, "key/value heads")
        attention = attention.with_heads(groups * attention.heads // attention.kv_heads, groups)
    else:
        attention = attention.with_heads(_part(attention.heads, heads_kept, "query heads"), 1)
    return LayerShape(attention, feedforward.with_hidden(_part(feedforward.hidden, channels_kept, "channels")))


def _part(units: int, kept: float, what: str) -> int:
    if abs(units * kept - round(units * kept)) > 1e-9 or round(units * kept) < 1:
        raise Rejected(f"{kept} of {units} {what} is no whole number of them")
    return round(units * kept)


def _keep_units(weights: dict[str, np.ndarray], inputs: list[str], output: str, units: int, kept: int) -> None:
    """Keep the `kept` largest of `units`, which are blocks of columns of `inputs` and of rows of `output`."""
    score = np.zeros(units)
    for path in (*inputs, output):
        matrix = weights[path] if path == output else weights[path].T
        squares = np.square(matrix, dtype=np.float64).reshape(units, -1).sum(axis=1)
        score += squares / max(squares.mean(), 1e-30)
    keep = np.sort(np.argsort(-score, kind="stable")[:kept])
    for path in inputs:
        blocks = weights[path].reshape(len(weights[path]), units, -1)
        weights[path] = np.ascontiguousarray(blocks[:, keep].reshape(len(blocks), -1))
    blocks = weights[output].reshape(units, -1, weights[output].shape[1])
    weights[output] = np.ascontiguousarray(blocks[keep].reshape(-1, blocks.shape[2]))


PATTERNS.register("structured")(Structured())
