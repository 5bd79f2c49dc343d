"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): groups of query heads share a key/value head."""

from collections.abc import Mapping

from cosearch.architecture.attention import ATTENTION
from cosearch.architecture.attention.softmax import KV_HEADS, SoftmaxShape, kv_heads, query_heads
from cosearch.core.candidate import Value
from cosearch.core.space import Knob


class GroupedQuery:
    knobs: Mapping[str, Knob] = {"kv_heads": KV_HEADS}

    def shape(self, width: int, choices: Mapping[str, Value]) -> SoftmaxShape:
        heads, head_dim = query_heads(width, choices)
        return SoftmaxShape(heads, kv_heads(choices), head_dim)


ATTENTION.register("gqa")(GroupedQuery())
