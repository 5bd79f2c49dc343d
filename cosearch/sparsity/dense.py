"""Nothing is taken away."""

from collections.abc import Mapping

import numpy as np

from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Value
from cosearch.core.space import Knob
from cosearch.sparsity import PATTERNS, Moments


class Dense:
    knobs: Mapping[str, Knob] = {}

    def shape(self, shape: DecoderShape, choices: Mapping[str, Value]) -> DecoderShape:
        return shape

    def needs_moments(self, choices: Mapping[str, Value]) -> bool:
        return False

    def prune(
        self, weights: Mapping[str, np.ndarray], shape: DecoderShape, choices: Mapping[str, Value], moments: Moments
    ) -> dict[str, np.ndarray]:
        return dict(weights)


PATTERNS.register("dense")(Dense())
