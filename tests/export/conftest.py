"""Candidates to be loaded."""

from collections.abc import Callable, Mapping

import pytest

from cosearch import axes
from cosearch.core.candidate import Candidate, Value
from cosearch.testing import small_space

Choose = Callable[[Mapping[str, Value]], Candidate]


@pytest.fixture(scope="session")
def choose() -> Choose:
    """Three layers of a width of 128 with some knobs set, legal where nothing is deployed."""
    space = small_space({"architecture.width": [128], "architecture.depth": [3]})
    defaults = {name: knob.default for name, knob in axes.declared_knobs().items()}

    def chosen(choices: Mapping[str, Value]) -> Candidate:
        point = space.canonical({**defaults, **space.reference.point, **choices})
        assert space.why_invalid(point) is None
        return Candidate.from_point(point)

    return chosen
