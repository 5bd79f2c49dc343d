"""Candidates as rows of indices, and their choices as numbers."""

import random

import numpy as np

from cosearch import axes
from cosearch.core.candidate import Value
from cosearch.latency.encoding import Encoding
from cosearch.testing import small_space


def test_numbers_are_one_feature_names_one_each_and_what_leaves_no_choice_none():
    knobs: dict[str, list[Value]] = {
        "architecture.width": [64, 32],
        "architecture.depth": [2],
        "architecture.head_dim": [16],
        "architecture.attention": ["mha", "mqa"],
        "precision.weights": ["float32", "int8", "bfloat16"],
    }
    space = small_space(knobs)
    encoding, candidate = Encoding(space), space.reference
    rows = encoding.rows([candidate])
    found = encoding.features(rows, ("architecture",))
    np.testing.assert_allclose(np.sort(found), np.sort([[np.log1p(64), 1.0, 0.0]]))
    # The order of the axes that are named says nothing.
    both = encoding.features(rows, ("precision", "architecture"))
    np.testing.assert_array_equal(both, encoding.features(rows, ("architecture", "precision")))
    assert both.shape[1] == found.shape[1] + 3
    assert encoding.features(rows, ()).shape == (1, 0)


def test_a_knob_that_is_not_active_is_0():
    space, rng = axes.load_space("llm_decode_full", target="cpu"), random.Random(0)
    encoding = Encoding(space)
    candidates = [space.sample(rng) for _ in range(50)]
    rows = encoding.rows(candidates)
    features = encoding.features(rows, ("architecture",))
    for candidate, own in zip(candidates, features, strict=True):
        names = [value for name, value in candidate.point.items() if name.startswith("architecture.")]
        assert np.count_nonzero(own) <= len(names)
    assert (rows == -1).any()
