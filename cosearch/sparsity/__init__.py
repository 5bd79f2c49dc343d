"""Axis *sparsity*: which parts of a trained model are taken away, one pattern per file, and which keys a query skips.

To add a pattern of weights, write `<name>.py` here and register a `Pattern`; `cosearch.testing.check_pattern` then
tests it. `criteria.py` says which weights matter least; `compressed.py` has what patterns share that store matrices by
a `Compression`. `block_attention.py` is the sparsity of attention, which goes with any pattern.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices, Value
from cosearch.core.registry import Registry
from cosearch.core.space import Knob, choice, variant_knobs
from cosearch.sparsity import block_attention

Moments = Mapping[str, np.ndarray]
"""A matrix's path to the mean of its inputs times themselves, [in, in], or [E, in, in] for a stack of matrices."""


class Pattern(Protocol):
    """A way of taking weights away."""

    knobs: Mapping[str, Knob]

    def shape(self, shape: DecoderShape, choices: Mapping[str, Value]) -> DecoderShape:
        """What is left of a decoder of this shape.

        Raises:
            Rejected: the choices ask for a part that the shape cannot give.
        """
        ...

    def needs_moments(self, choices: Mapping[str, Value]) -> bool:
        """Whether `prune` reads the moments of calibration data."""
        ...

    def prune(
        self, weights: Mapping[str, np.ndarray], shape: DecoderShape, choices: Mapping[str, Value], moments: Moments
    ) -> dict[str, np.ndarray]:
        """The weights that are left, for the decoder of `self.shape(shape, choices)`.

        A weight that a compressed matrix leaves out is zero here. `moments` are of this model's matrices; they may be
        empty where they are not needed.
        """
        ...


PATTERNS: Registry[Pattern] = Registry("pattern", __name__)


def knobs() -> Mapping[str, Knob]:
    """The pattern's name, the knobs of every registered pattern, and those of sparse attention."""
    pattern = {"pattern": choice("dense", PATTERNS.names)} | variant_knobs("sparsity.pattern", PATTERNS)
    return {**pattern, **block_attention.KNOBS}


def pattern_of(choices: Choices) -> tuple[Pattern, Mapping[str, Value]]:
    """A candidate's pattern, and all its choices with defaults filled in."""
    values = {name: choices.get(name, knob.default) for name, knob in knobs().items()}
    return PATTERNS[str(values["pattern"])], values


def served_shape(shape: DecoderShape, choices: Choices) -> DecoderShape:
    """What a candidate's sparsity leaves of a decoder of this shape.

    Raises:
        Rejected: the choices ask for a part that the shape cannot give.
    """
    pattern, values = pattern_of(choices)
    return block_attention.sparse(pattern.shape(shape, values), values)
