"""No attention: the block is skipped, and has neither norm nor parameters nor cache."""

from collections.abc import Mapping

from cosearch.architecture.attention import ATTENTION, Place
from cosearch.core.candidate import Value
from cosearch.core.space import Knob


class NoAttention:
    knobs: Mapping[str, Knob] = {}

    def shape(self, place: Place, choices: Mapping[str, Value]) -> None:
        return None


ATTENTION.register("none")(NoAttention())
