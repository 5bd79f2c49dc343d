"""Multi-head attention (Vaswani et al. 2017): every query head has its own key/value head."""

from collections.abc import Mapping

from cosearch.architecture.attention import ATTENTION
from cosearch.architecture.attention.softmax import SoftmaxShape, query_heads
from cosearch.core.candidate import Value
from cosearch.core.space import Knob


class MultiHead:
    knobs: Mapping[str, Knob] = {}

    def shape(self, width: int, choices: Mapping[str, Value]) -> SoftmaxShape:
        heads, head_dim = query_heads(width, choices)
        return SoftmaxShape(heads, heads, head_dim)


ATTENTION.register("mha")(MultiHead())
