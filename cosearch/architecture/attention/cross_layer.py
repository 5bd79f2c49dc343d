"""Cross-layer attention (Brandon et al. 2024, arXiv:2405.12981): a layer attends to the keys and values of the layer
below, and has neither matrices nor cache for its own."""

from collections.abc import Mapping
from dataclasses import replace

from cosearch.architecture.attention import ATTENTION, Place
from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.core.candidate import Value
from cosearch.core.errors import Rejected
from cosearch.core.space import Knob


class CrossLayer:
    knobs: Mapping[str, Knob] = {}

    def shape(self, place: Place, choices: Mapping[str, Value]) -> SoftmaxShape:
        if not isinstance(place.below, SoftmaxShape):
            raise Rejected(
                f"layer {place.index} has cross_layer attention, and no layer below it has keys and values to share"
            )
        return replace(place.below, borrows=True)


ATTENTION.register("cross_layer")(CrossLayer())
