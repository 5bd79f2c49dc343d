"""No feed-forward: the block is skipped, and has neither norm nor parameters."""

from collections.abc import Mapping

from cosearch.architecture.feedforward import FEEDFORWARD
from cosearch.core.candidate import Value
from cosearch.core.space import Knob


class NoFeedForward:
    knobs: Mapping[str, Knob] = {}

    def shape(self, width: int, choices: Mapping[str, Value]) -> None:
        return None


FEEDFORWARD.register("none")(NoFeedForward())
