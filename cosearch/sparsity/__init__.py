"""Axis *sparsity*: which parts of a trained model are taken away, one pattern per file.

To add one, write `<name>.py` here and register a `Pattern`; `cosearch.testing.check_pattern` then tests it.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices, Value
from cosearch.core.registry import Registry
from cosearch.core.space import Knob, choice, variant_knobs


class Pattern(Protocol):
    """A way of taking weights away."""

    knobs: Mapping[str, Knob]

    def shape(self, shape: DecoderShape, choices: Mapping[str, Value]) -> DecoderShape:
        """What is left of a decoder of this shape.

        Raises:
            Rejected: the choices ask for a part that the shape cannot give.
        """
        ...

    def prune(
        self, weights: Mapping[str, np.ndarray], shape: DecoderShape, choices: Mapping[str, Value]
    ) -> dict[str, np.ndarray]:
        """The weights that are left, for the decoder of `self.shape(shape, choices)`."""
        ...


PATTERNS: Registry[Pattern] = Registry("pattern", __name__)


def knobs() -> Mapping[str, Knob]:
    """The pattern's name and the knobs of every registered pattern."""
    return {"pattern": choice("dense", PATTERNS.names)} | variant_knobs("sparsity.pattern", PATTERNS)


def pattern_of(choices: Choices) -> tuple[Pattern, Mapping[str, Value]]:
    """A candidate's pattern, and all its choices with defaults filled in."""
    values = {name: choices.get(name, knob.default) for name, knob in knobs().items()}
    return PATTERNS[str(values["pattern"])], values
