"""Multi-query attention (Shazeer 2019, arXiv:1911.02150): all query heads share one key/value head."""

from collections.abc import Mapping

from cosearch.architecture.attention import ATTENTION, Place
from cosearch.architecture.attention.softmax import QK_NORM, SoftmaxShape
from cosearch.core.candidate import Value
from cosearch.core.space import Knob


class MultiQuery:
    knobs: Mapping[str, Knob] = QK_NORM

    def shape(self, place: Place, choices: Mapping[str, Value]) -> SoftmaxShape:
        return SoftmaxShape.of(place, choices, kv_heads=1)


ATTENTION.register("mqa")(MultiQuery())
