"""Multi-query attention (Shazeer 2019, arXiv:1911.02150): all query heads share one key/value head."""

from collections.abc import Mapping

from cosearch.architecture.attention import ATTENTION
from cosearch.architecture.attention.softmax import SoftmaxShape, query_heads
from cosearch.core.candidate import Value
from cosearch.core.space import Knob


class MultiQuery:
    knobs: Mapping[str, Knob] = {}

    def shape(self, width: int, choices: Mapping[str, Value]) -> SoftmaxShape:
        heads, head_dim = query_heads(width, choices)
        return SoftmaxShape(heads, 1, head_dim)


ATTENTION.register("mqa")(MultiQuery())
