"""Whole layers, attention heads and feed-forward channels are removed, so that what is left is really smaller.

A head or channel goes by the saliency of its weights (`criteria.py`), each matrix relative to its mean: by magnitude
this is the structured pruning of Li et al. 2017, arXiv:1608.08710. Query heads that share a key/value head go or stay
together; under a single key/value head, query heads go one by one. Every expert loses channels of its own. A layer goes
by what it writes to the residual stream: the squares of the weights that write, or, where activations count, the
expected square of what is written.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from cosearch.architecture.attention import AttentionShape
from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.architecture.feedforward import FeedForwardShape
from cosearch.architecture.feedforward.mlp import MLPShape
from cosearch.architecture.feedforward.moe import MoEShape
from cosearch.architecture.shape import WRITES_RESIDUAL, DecoderShape, LayerShape
from cosearch.core.candidate import Value
from cosearch.core.errors import Rejected
from cosearch.core.space import Knob, fraction, whole_part
from cosearch.sparsity import PATTERNS, Moments
from cosearch.sparsity.criteria import CRITERION, reads_moments, refuse_sparsegpt, saliency


class Structured:
    """`heads_kept` and `channels_kept` are the fractions that stay in every layer, `layers_kept` that of layers."""

    knobs: Mapping[str, Knob] = {
        "heads_kept": fraction(0.5),
        "channels_kept": fraction(0.5),
        "layers_kept": fraction(1.0),
        **CRITERION,
    }

    def shape(self, shape: DecoderShape, choices: Mapping[str, Value]) -> DecoderShape:
        refuse_sparsegpt(choices, "heads, channels or layers")
        heads, channels, layers = (choices[f"{units}_kept"] for units in ("heads", "channels", "layers"))
        assert isinstance(heads, int | float) and isinstance(channels, int | float) and isinstance(layers, int | float)
        if heads == channels == layers == 1:
            raise Rejected(
                "heads_kept, channels_kept and layers_kept of 1 take nothing away: that is the pattern 'dense'"
            )
        if channels != 1 and all(layer.feedforward is None for layer in shape.layers):
            raise Rejected(f"channels_kept={channels} has nothing to take away: no layer has a feed-forward")
        if layers != 1 and not shape.uniform:
            raise Rejected(f"layers_kept={layers} needs layers that are all alike, and these differ")
        left = shape.layers[: _part(len(shape.layers), layers, "layers")]
        return replace(
            shape,
            layers=tuple(
                LayerShape(_fewer_heads(layer.attention, heads), _fewer_channels(layer.feedforward, channels))
                for layer in left
            ),
        )

    def needs_moments(self, choices: Mapping[str, Value]) -> bool:
        return reads_moments(choices)

    def prune(
        self, weights: Mapping[str, np.ndarray], shape: DecoderShape, choices: Mapping[str, Value], moments: Moments
    ) -> dict[str, np.ndarray]:
        read = moments if reads_moments(choices) else None
        matrices = shape.linears()
        left = self.shape(shape, choices)
        written = [_written(weights, read, index) for index in range(len(shape.layers))]
        layers = np.sort(np.argsort(-np.array(written), kind="stable")[: len(left.layers)]).tolist()
        pruned = {path: array for path, array in weights.items() if not path.startswith("layers.")}
        for index, (old, after) in enumerate(zip(layers, left.layers, strict=True)):
            prefix = f"layers.{old}."
            layer = {path.removeprefix(prefix): array for path, array in weights.items() if path.startswith(prefix)}
            own = {} if read is None else {name: read[prefix + name] for name in layer if prefix + name in matrices}
            for units in (*_heads(shape.layers[old], after), *_channels(shape.layers[old], after)):
                units.prune(layer, own)
            pruned |= {f"layers.{index}.{name}": array for name, array in layer.items()}
        return pruned


@dataclass(frozen=True)
class _Units:
    """`count` equal blocks of columns of the matrices `inputs` and of rows of `output`, of which `kept` stay."""

    inputs: tuple[str, ...]
    output: str
    count: int
    kept: int

    def prune(self, layer: dict[str, np.ndarray], moments: Moments) -> None:
        """Keep the units whose weights matter most, in their order; each expert of a stack its own."""
        matrices = {name: layer[name] for name in (*self.inputs, self.output)}
        if matrices[self.output].ndim == 2:
            layer |= self._most(matrices, moments)
            return
        experts = [
            self._most(
                {name: stack[index] for name, stack in matrices.items()},
                {name: stack[index] for name, stack in moments.items()},
            )
            for index in range(len(matrices[self.output]))
        ]
        layer |= {name: np.stack([expert[name] for expert in experts]) for name in matrices}

    def _most(self, matrices: Mapping[str, np.ndarray], moments: Moments) -> dict[str, np.ndarray]:
        score = np.zeros(self.count)
        for name, matrix in matrices.items():
            matter = saliency(matrix, moments[name] if moments else None)
            each = (matter if name == self.output else matter.T).reshape(self.count, -1).sum(axis=1)
            score += each / max(each.mean(), 1e-30)
        keep = np.sort(np.argsort(-score, kind="stable")[: self.kept])
        left = {}
        for name, matrix in matrices.items():
            if name == self.output:
                blocks = matrix.reshape(self.count, -1, matrix.shape[1])
                left[name] = blocks[keep].reshape(-1, matrix.shape[1])
            else:
                blocks = matrix.reshape(len(matrix), self.count, -1)
                left[name] = blocks[:, keep].reshape(len(matrix), -1)
        return left


def _heads(before: LayerShape, after: LayerShape) -> Iterator[_Units]:
    old, new = before.attention, after.attention
    if old != new:
        assert isinstance(old, SoftmaxShape) and isinstance(new, SoftmaxShape)
        if old.kv_heads > 1:
            names = ("attention.query", "attention.key", "attention.value")
            yield _Units(names, "attention.output", old.kv_heads, new.kv_heads)
        else:
            yield _Units(("attention.query",), "attention.output", old.heads, new.heads)


def _channels(before: LayerShape, after: LayerShape) -> Iterator[_Units]:
    old, new = before.feedforward, after.feedforward
    if isinstance(old, MoEShape) and isinstance(new, MoEShape):
        for name, count, kept in (("", old.hidden, new.hidden), ("shared_", old.shared_hidden, new.shared_hidden)):
            if count != kept:
                inputs = (f"feedforward.{name}gate", f"feedforward.{name}up")
                yield _Units(inputs, f"feedforward.{name}down", count, kept)
    elif old != new:
        assert isinstance(old, MLPShape) and isinstance(new, MLPShape)
        inputs = tuple(f"feedforward.{name}" for name in old.reads_norm)
        yield _Units(inputs, "feedforward.down", old.hidden, new.hidden)


def _fewer_heads(attention: AttentionShape | None, kept: float) -> AttentionShape | None:
    if attention is None or kept == 1:
        return attention
    if not isinstance(attention, SoftmaxShape):
        raise Rejected(f"heads_kept={kept} is for softmax attention, whose heads stand side by side in its matrices")
    if attention.borrows:
        raise Rejected(f"heads_kept={kept} would take the keys away that cross_layer attention borrows")
    if attention.kv_heads == 1:
        return replace(attention, heads=_part(attention.heads, kept, "query heads"))
    groups = _part(attention.kv_heads, kept, "key/value heads")
    return replace(attention, heads=groups * attention.heads // attention.kv_heads, kv_heads=groups)


def _fewer_channels(feedforward: FeedForwardShape | None, kept: float) -> FeedForwardShape | None:
    if feedforward is None or kept == 1:
        return feedforward
    if isinstance(feedforward, MoEShape):
        shared = feedforward.shared_hidden and _part(feedforward.shared_hidden, kept, "shared channels")
        return replace(feedforward, hidden=_part(feedforward.hidden, kept, "channels"), shared_hidden=shared)
    if not isinstance(feedforward, MLPShape):
        raise Rejected(f"channels_kept={kept} is for the channels of swiglu, gelu and moe")
    return replace(feedforward, hidden=_part(feedforward.hidden, kept, "channels"))


def _part(units: int, kept: float, what: str) -> int:
    left = whole_part(units, kept)
    if left is None:
        raise Rejected(f"{kept} of {units} {what} is no whole number of them")
    return left


def _written(weights: Mapping[str, np.ndarray], moments: Moments | None, layer: int) -> float:
    """The squares of what a layer writes to the residual stream: of its weights, or expected of their products.

    The latter is trace(W^T H W), also over the experts of a stack, whose moments count each by its use.
    """
    total = 0.0
    for path, matrix in weights.items():
        if path.startswith(f"layers.{layer}.") and path.endswith(WRITES_RESIDUAL):
            matrix = matrix.astype(np.float64)
            total += float((matrix * (matrix if moments is None else moments[path] @ matrix)).sum())
    return total


PATTERNS.register("structured")(Structured())
