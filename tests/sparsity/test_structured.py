import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.architecture.decoder import bind, pack, plain_decoder, random_weights
from cosearch.architecture.feedforward.swiglu import SwiGLUShape
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices
from cosearch.core.errors import Rejected
from cosearch.precision import Precision
from cosearch.sparsity import PATTERNS

STRUCTURED = PATTERNS["structured"]
HALF = {"heads_kept": 0.5, "channels_kept": 0.75}


def shape_of(**choices: object) -> DecoderShape:
    return DecoderShape.of(Choices({"width": 64, "depth": 2, "head_dim": 16, "ffn_ratio": 1, **choices}))


def rows_left(dense: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """Which rows of `dense` are in `pruned`; they are in the same order."""
    left = np.array([any((row == other).all() for other in pruned) for row in dense])
    np.testing.assert_array_equal(dense[left], pruned)
    return left


def score(shape: DecoderShape, weights: dict[str, np.ndarray]) -> np.ndarray:
    tokens = np.random.default_rng(1).integers(0, 256, (2, 12), dtype=np.int32)
    with jax.enable_x64(True):
        model = plain_decoder(shape, Precision("float64", "float64", "float64"))
        return np.asarray(jax.jit(lambda p: bind(model, p).score(jnp.asarray(tokens)))(pack(model, weights)))


@pytest.mark.parametrize("attention", [{"attention": "gqa", "kv_heads": 2}, {"attention": "mqa"}])
def test_it_computes_what_the_dense_model_does_without_the_removed_parts(attention: dict[str, object]):
    shape = shape_of(**attention)
    dense = random_weights(shape, 0)
    pruned = STRUCTURED.prune(dense, shape, HALF)
    masked = dict(dense)
    for path in dense:
        if path.endswith((".output", ".down")):
            left = rows_left(dense[path], pruned[path])
            assert left.mean() == (0.5 if path.endswith("output") else 0.75)
            masked[path] = np.where(left[:, None], dense[path], 0)
    ours, expected = score(STRUCTURED.shape(shape, HALF), pruned), score(shape, masked)
    np.testing.assert_allclose(ours, expected, atol=1e-9 * np.abs(expected).max())
    assert np.abs(expected - score(shape, dense)).max() > 1e-3 * np.abs(expected).max()


def test_the_largest_units_stay():
    shape = shape_of(attention="gqa", kv_heads=2)
    weights = random_weights(shape, 0)
    channels = np.random.default_rng(2).permutation(64)[:48]
    for name in ("gate", "up"):
        weights[f"layers.1.feedforward.{name}"][:, channels] *= 3
    weights["layers.1.attention.value"][:, 16:] *= 3
    pruned = STRUCTURED.prune(weights, shape, HALF)
    kept = rows_left(weights["layers.1.feedforward.down"], pruned["layers.1.feedforward.down"])
    assert sorted(np.flatnonzero(kept)) == sorted(channels)
    np.testing.assert_array_equal(pruned["layers.1.attention.key"], weights["layers.1.attention.key"][:, 16:])
    np.testing.assert_array_equal(pruned["layers.1.attention.query"], weights["layers.1.attention.query"][:, 32:])


def test_heads_that_share_keys_go_together_and_those_of_one_key_one_by_one():
    for choices, left in (
        ({"attention": "mha"}, SoftmaxShape(2, 2, 16)),
        ({"attention": "gqa", "kv_heads": 2}, SoftmaxShape(2, 1, 16)),
        ({"attention": "mqa"}, SoftmaxShape(2, 1, 16)),
    ):
        [layer] = set(STRUCTURED.shape(shape_of(**choices), HALF).layers)
        assert (layer.attention, layer.feedforward) == (left, SwiGLUShape(48))


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ({"heads_kept": 1.0, "channels_kept": 1.0}, "that is the pattern 'dense'"),
        ({"heads_kept": 0.3, "channels_kept": 0.5}, "0.3 of 4 key/value heads is no whole number"),
        ({"heads_kept": 0.5, "channels_kept": 0.01}, "0.01 of 64 channels is no whole number"),
    ],
)
def test_what_cannot_be_taken_is_refused(kept: dict[str, float], words: str):
    with pytest.raises(Rejected, match=words):
        STRUCTURED.shape(shape_of(), kept)
