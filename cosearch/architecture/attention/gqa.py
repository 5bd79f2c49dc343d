"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): groups of query heads share a key/value head."""

from collections.abc import Mapping

from cosearch.architecture.attention import ATTENTION, Place
from cosearch.architecture.attention.softmax import KV_HEADS, QK_NORM, SoftmaxShape
from cosearch.core.candidate import Value
from cosearch.core.space import Knob


class GroupedQuery:
    knobs: Mapping[str, Knob] = {**QK_NORM, **KV_HEADS}

    def shape(self, place: Place, choices: Mapping[str, Value]) -> SoftmaxShape:
        return SoftmaxShape.of(place, choices, choices["kv_heads"])


ATTENTION.register("gqa")(GroupedQuery())
