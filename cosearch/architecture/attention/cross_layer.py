"""Cross-layer attention (Brandon et al. 2024, arXiv:2405.12981): a layer attends to the keys and values of the layer
below, and has neither matrices nor cache for its own. Its queries are its own in number and norm."""

from collections.abc import Mapping
from dataclasses import replace

from cosearch.architecture.attention import ATTENTION, Place
from cosearch.architecture.attention.softmax import QK_NORM, SoftmaxShape
from cosearch.core.candidate import Value
from cosearch.core.errors import Rejected
from cosearch.core.space import Knob


class CrossLayer:
    knobs: Mapping[str, Knob] = QK_NORM

    def shape(self, place: Place, choices: Mapping[str, Value]) -> SoftmaxShape:
        below = place.below
        if not isinstance(below, SoftmaxShape):
            raise Rejected("cross_layer attention needs a layer below it that has keys and values to share")
        own = SoftmaxShape.of(place, choices, below.kv_heads)
        if own.head_dim != below.head_dim:
            raise Rejected(f"heads of {own.head_dim} cannot attend to keys of {below.head_dim} of the layer below")
        return replace(own, window=below.window, sinks=below.sinks, borrows=True)


ATTENTION.register("cross_layer")(CrossLayer())
