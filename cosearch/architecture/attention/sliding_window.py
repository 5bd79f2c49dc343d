"""Sliding-window attention (Mistral 7B, arXiv:2310.06825): a token sees the last `window` tokens, itself
included, and the cache is a ring of as many slots."""

from collections.abc import Mapping

from cosearch.architecture.attention import ATTENTION
from cosearch.architecture.attention.softmax import KV_HEADS, QK_NORM, SoftmaxShape
from cosearch.core.candidate import Value
from cosearch.core.space import Knob, integer


class SlidingWindow:
    knobs: Mapping[str, Knob] = {**QK_NORM, **KV_HEADS, "window": integer(128, per_layer=True)}

    def shape(self, width: int, choices: Mapping[str, Value]) -> SoftmaxShape:
        return SoftmaxShape.of(width, choices, choices["kv_heads"], choices["window"])


ATTENTION.register("sliding_window")(SlidingWindow())
