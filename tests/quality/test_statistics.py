"""The moments of what matrices are multiplied with are those of the model as it runs."""

import jax
import numpy as np
import pytest

from cosearch.architecture.decoder import random_weights
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices, Value
from cosearch.quality import Recipe, corpus, statistics

SMALL: dict[str, Value] = {"width": 32, "depth": 2, "head_dim": 16, "ffn_ratio": 2}


@pytest.fixture(scope="module")
def text() -> corpus.Corpus:
    return corpus.load("python")


def shape_of(**choices: Value) -> DecoderShape:
    return DecoderShape.of(Choices({**SMALL, **choices}))


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"attention": ("gated_delta", "mla"), "latent": 16},
        {"feedforward": ("moe", "none")},
        {"attention": ("mha", "cross_layer"), "feedforward": "gelu"},
    ],
    ids=str,
)
def test_every_matrix_has_a_moment_of_its_inputs(text: corpus.Corpus, choices: dict[str, Value]):
    shape = shape_of(**choices)
    found = statistics.moments(shape, random_weights(shape, 0), Recipe(), text)
    assert found.keys() == shape.linears().keys()
    for path, (*stack, rows, _) in shape.linears().items():
        assert found[path].shape == (*stack, rows, rows)
        np.testing.assert_allclose(found[path], np.swapaxes(found[path], -1, -2), atol=1e-5)
        assert np.linalg.eigvalsh(found[path]).min() > -1e-4


def test_matrices_that_read_a_norm_have_the_same_moment(text: corpus.Corpus):
    shape = shape_of()
    found = statistics.moments(shape, random_weights(shape, 0), Recipe(), text)
    for block, names in (("attention", ("query", "key", "value")), ("feedforward", ("gate", "up"))):
        first, *others = (found[f"layers.1.{block}.{name}"] for name in names)
        for other in others:
            np.testing.assert_array_equal(first, other)
        # What comes from a norm whose scales are 1 has a mean square of 1.
        assert np.trace(first) / len(first) == pytest.approx(1, rel=1e-3)


def test_a_moment_tells_the_size_of_a_product(text: corpus.Corpus):
    """tr(WᵀMW) is the mean square of the outputs: doubling the embedding's reader doubles nothing after its norm."""
    shape = shape_of(depth=1)
    weights = random_weights(shape, 0)
    before = statistics.moments(shape, weights, Recipe(), text)
    weights["layers.0.feedforward.up"] = 2 * weights["layers.0.feedforward.up"]
    after = statistics.moments(shape, weights, Recipe(), text)
    np.testing.assert_allclose(
        after["layers.0.feedforward.down"], 4 * before["layers.0.feedforward.down"], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(after["layers.0.feedforward.up"], before["layers.0.feedforward.up"])


def test_held_out_text_is_not_looked_at(text: corpus.Corpus):
    shape = shape_of(depth=1)
    weights = random_weights(shape, 0)
    other = corpus.Corpus("other", text.train, text.held_out[::-1].copy(), "0")
    first, second = (statistics.moments(shape, weights, Recipe(), one) for one in (text, other))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
