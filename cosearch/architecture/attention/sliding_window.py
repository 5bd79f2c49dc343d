"""Sliding-window attention (Mistral 7B, arXiv:2310.06825): a token sees the last `window` tokens, itself
included, and the first `sinks`; the cache is a ring of as many slots behind those of the sinks."""

from collections.abc import Mapping

from cosearch.architecture.attention import ATTENTION, Place
from cosearch.architecture.attention.softmax import KV_HEADS, QK_NORM, WINDOW, SoftmaxShape
from cosearch.core.candidate import Value
from cosearch.core.space import Knob


class SlidingWindow:
    knobs: Mapping[str, Knob] = {**QK_NORM, **KV_HEADS, **WINDOW}

    def shape(self, place: Place, choices: Mapping[str, Value]) -> SoftmaxShape:
        return SoftmaxShape.of(place, choices, choices["kv_heads"], windowed=True)


ATTENTION.register("sliding_window")(SlidingWindow())
