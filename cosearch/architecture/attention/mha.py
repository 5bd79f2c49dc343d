"""Multi-head attention (Vaswani et al. 2017): every query head has its own key/value head."""

from collections.abc import Mapping

from cosearch.architecture.attention import ATTENTION, Place
from cosearch.architecture.attention.softmax import QK_NORM, SoftmaxShape
from cosearch.core.candidate import Value
from cosearch.core.space import Knob


class MultiHead:
    knobs: Mapping[str, Knob] = QK_NORM

    def shape(self, place: Place, choices: Mapping[str, Value]) -> SoftmaxShape:
        return SoftmaxShape.of(place, choices)


ATTENTION.register("mha")(MultiHead())
