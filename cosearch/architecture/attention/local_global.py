"""Local and global layers in turn (Gemma 2 and 3, arXiv:2503.19786): `locals_per_global` layers see a window, then one
sees everything; counted among the layers of this variant, from the first on."""

from collections.abc import Mapping

from cosearch.architecture.attention import ATTENTION, Place
from cosearch.architecture.attention.softmax import KV_HEADS, QK_NORM, WINDOW, SoftmaxShape
from cosearch.core.candidate import Value
from cosearch.core.errors import Rejected
from cosearch.core.space import Knob, integer


class LocalGlobal:
    knobs: Mapping[str, Knob] = {**QK_NORM, **KV_HEADS, **WINDOW, "locals_per_global": integer(1)}

    def shape(self, place: Place, choices: Mapping[str, Value]) -> SoftmaxShape:
        period = choices["locals_per_global"]
        assert isinstance(period, int)
        if place.turns <= period:
            raise Rejected(f"{period} local layers before each global one leave none of {place.turns} layers global")
        windowed = place.turn % (period + 1) < period
        return SoftmaxShape.of(place, choices, choices["kv_heads"], windowed)


ATTENTION.register("local_global")(LocalGlobal())
