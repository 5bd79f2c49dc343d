"""Sparse attention for long contexts: a query reads the few blocks of keys that answer it best, and its own block.

A block is scored by the sum of its keys, which the cache keeps beside them (mixture of block attention, Lu et al. 2025,
arXiv:2502.13189; here without training for it). A decode step so reads one key in float32 for each `attention_block`
tokens, and `attention_kept` + 1 blocks of the cache whole. It is for attention that sees everything: windows are short
already.
"""

from collections.abc import Mapping
from dataclasses import replace

from cosearch.architecture.attention.softmax import BlockTopK, SoftmaxShape
from cosearch.architecture.shape import DecoderShape, LayerShape
from cosearch.core.candidate import Value
from cosearch.core.errors import Rejected
from cosearch.core.space import Knob, choice, integer

_USED = ("sparsity.attention", ("block_topk",))

KNOBS: Mapping[str, Knob] = {
    "attention": choice("dense", lambda: ("dense", "block_topk")),
    "attention_block": integer(16, used_by=_USED),
    "attention_kept": integer(4, used_by=_USED),
}


def sparse(shape: DecoderShape, choices: Mapping[str, Value]) -> DecoderShape:
    """The shape whose full attention is by blocks, where the choices say so.

    Raises:
        Rejected: no layer has attention that this can be said of.
    """
    if choices["attention"] == "dense":
        return shape
    size, kept = choices["attention_block"], choices["attention_kept"]
    assert isinstance(size, int) and isinstance(kept, int)
    layers = tuple(_sparse_layer(layer, BlockTopK(size, kept)) for layer in shape.layers)
    if layers == shape.layers:
        raise Rejected("attention 'block_topk' needs a layer with softmax attention to all tokens, and there is none")
    return replace(shape, layers=layers)


def _sparse_layer(layer: LayerShape, blocks: BlockTopK) -> LayerShape:
    attention = layer.attention
    if not isinstance(attention, SoftmaxShape) or attention.window is not None:
        return layer
    if attention.borrows:
        raise Rejected("attention 'block_topk' reads some keys only, and cross_layer attention shares all of them")
    return replace(layer, attention=replace(attention, blocks=blocks))
