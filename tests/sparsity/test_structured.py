import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosearch import testing
from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.architecture.decoder import bind, pack, plain_decoder, random_weights
from cosearch.architecture.feedforward.mlp import MLPShape
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices, Value
from cosearch.core.errors import Rejected
from cosearch.precision import Precision
from cosearch.sparsity import PATTERNS

STRUCTURED = PATTERNS["structured"]
ALL = {"heads_kept": 1.0, "channels_kept": 1.0, "layers_kept": 1.0, "criterion": "magnitude"}
HALF = {**ALL, "heads_kept": 0.5, "channels_kept": 0.75}


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
    pruned = STRUCTURED.prune(dense, shape, HALF, {})
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
    pruned = STRUCTURED.prune(weights, shape, HALF, {})
    kept = rows_left(weights["layers.1.feedforward.down"], pruned["layers.1.feedforward.down"])
    assert sorted(np.flatnonzero(kept)) == sorted(channels)
    np.testing.assert_array_equal(pruned["layers.1.attention.key"], weights["layers.1.attention.key"][:, 16:])
    np.testing.assert_array_equal(pruned["layers.1.attention.query"], weights["layers.1.attention.query"][:, 32:])


def test_activations_decide_by_wanda():
    shape = shape_of(attention="gqa", kv_heads=2)
    weights, moments = random_weights(shape, 0), testing.random_moments(shape)
    loud = np.random.default_rng(3).permutation(64)[:48]
    moments = {path: np.eye(len(moment)) for path, moment in moments.items()}
    moments["layers.0.feedforward.down"][loud, loud] = 1000
    moments["layers.0.attention.output"][32:] *= 1000
    pruned = STRUCTURED.prune(weights, shape, HALF | {"criterion": "wanda"}, moments)
    kept = rows_left(weights["layers.0.feedforward.down"], pruned["layers.0.feedforward.down"])
    assert sorted(np.flatnonzero(kept)) == sorted(loud)
    np.testing.assert_array_equal(pruned["layers.0.attention.output"], weights["layers.0.attention.output"][32:])


def test_channels_of_gelu_go_in_both_halves():
    shape = shape_of(feedforward="gelu")
    weights = random_weights(shape, 0)
    weights["layers.0.feedforward.up"][:, :48] *= 3
    pruned = STRUCTURED.prune(weights, shape, HALF, {})
    np.testing.assert_array_equal(pruned["layers.0.feedforward.up"], weights["layers.0.feedforward.up"][:, :48])
    np.testing.assert_array_equal(pruned["layers.0.feedforward.down"], weights["layers.0.feedforward.down"][:48])


def test_every_expert_loses_channels_of_its_own():
    shape = shape_of(feedforward="moe", experts=3)
    weights = random_weights(shape, 0)
    down = weights["layers.1.feedforward.down"]
    for expert in range(3):
        down[expert, 16 * expert : 16 * expert + 16] = 0
    choices = ALL | {"channels_kept": 0.75}
    pruned = STRUCTURED.prune(weights, shape, choices, {})
    left = STRUCTURED.shape(shape, choices).linears()
    assert all(pruned[path].shape == sizes for path, sizes in left.items())
    for expert in range(3):
        expected = np.delete(down[expert], np.s_[16 * expert : 16 * expert + 16], axis=0)
        np.testing.assert_array_equal(pruned["layers.1.feedforward.down"][expert], expected)
    assert pruned["layers.1.feedforward.shared_down"].shape == (48, 64)
    np.testing.assert_array_equal(pruned["layers.1.feedforward.router"], weights["layers.1.feedforward.router"])


def test_the_layers_that_write_most_stay_and_are_counted_anew():
    shape = shape_of(depth=4)
    weights = random_weights(shape, 0)
    weights["layers.0.feedforward.down"] *= 0.1
    weights["layers.0.attention.output"] *= 0.1
    weights["layers.2.feedforward.down"] *= 0.1
    weights["layers.3.attention_norm"] += 1
    choices = ALL | {"layers_kept": 0.5}
    assert STRUCTURED.shape(shape, choices) == shape_of(depth=2)
    pruned = STRUCTURED.prune(weights, shape, choices, {})
    assert {path for path in pruned if path.startswith("layers.")} == {
        path for path in weights if path.startswith(("layers.0.", "layers.1."))
    }
    for path, array in pruned.items():
        old = path.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.1.")
        np.testing.assert_array_equal(array, weights[old])


def test_by_wanda_a_layer_counts_for_what_it_is_expected_to_write():
    shape = shape_of(depth=2, feedforward="moe", experts=2, shared_ratio=0)
    weights = random_weights(shape, 0)
    moments = {path: np.zeros((*sizes[:-1], sizes[-2])) for path, sizes in shape.linears().items()}
    # All that the second layer writes comes from two inputs of one expert, which cancel out but for a little.
    moments["layers.1.feedforward.down"][1, :2, :2] = [[1.0, -1.0], [-1.0, 1.0]]
    moments["layers.0.attention.output"] = 0.01 * np.eye(64)
    first, second = weights["layers.0.attention.output"], weights["layers.1.feedforward.down"]
    first[:], second[1] = 1, 1
    choices = ALL | {"layers_kept": 0.5, "criterion": "wanda"}
    for value, kept in ((1.001, 0), (3.0, 1)):
        second[1, 0] = value
        pruned = STRUCTURED.prune(weights, shape, choices, moments)
        np.testing.assert_array_equal(
            pruned["layers.0.attention.query"], weights[f"layers.{kept}.attention.query"], err_msg=str(value)
        )


def test_what_is_skipped_has_nothing_to_lose():
    shape = shape_of(attention=("mha", "none"), feedforward=("none", "swiglu"))
    first, second = STRUCTURED.shape(shape, HALF).layers
    assert first.attention == SoftmaxShape(2, 2, 16) and first.feedforward is None
    assert second.attention is None and second.feedforward == MLPShape(48, gated=True)
    pruned = STRUCTURED.prune(random_weights(shape, 0), shape, HALF, {})
    assert pruned["layers.0.attention.output"].shape == (32, 64)
    assert pruned["layers.1.feedforward.down"].shape == (48, 64)


def test_other_choices_keep_the_contract():
    testing.check_pattern("structured", {**ALL, "layers_kept": 0.5, "heads_kept": 0.5, "criterion": "wanda"})


def test_heads_that_share_keys_go_together_and_those_of_one_key_one_by_one():
    for choices, left in (
        ({"attention": "mha"}, SoftmaxShape(2, 2, 16)),
        ({"attention": "gqa", "kv_heads": 2}, SoftmaxShape(2, 1, 16)),
        ({"attention": "mqa"}, SoftmaxShape(2, 1, 16)),
    ):
        [layer] = set(STRUCTURED.shape(shape_of(**choices), HALF).layers)
        assert (layer.attention, layer.feedforward) == (left, MLPShape(48, gated=True))


@pytest.mark.parametrize("attention", ["mla", "gated_delta"])
def test_channels_and_layers_go_under_any_attention(attention: str):
    shape = shape_of(attention=attention, latent=16, rope_dim=8)
    left = STRUCTURED.shape(shape, ALL | {"channels_kept": 0.5, "layers_kept": 0.5})
    assert left.layers[0].attention == shape.layers[0].attention and len(left.layers) == 1
    with pytest.raises(Rejected, match=r"heads_kept=0.5 is for softmax attention"):
        STRUCTURED.shape(shape, HALF)


@pytest.mark.parametrize(
    ("architecture", "kept", "words"),
    [
        ({}, {}, "that is the pattern 'dense'"),
        ({}, {"heads_kept": 0.3}, "0.3 of 4 key/value heads is no whole number"),
        ({"attention": "mqa"}, {"heads_kept": 0.3}, "0.3 of 4 query heads is no whole number"),
        ({}, {"channels_kept": 0.01}, "0.01 of 64 channels is no whole number"),
        ({}, {"layers_kept": 0.75}, "0.75 of 2 layers is no whole number"),
        ({}, {"heads_kept": 0.5, "criterion": "sparsegpt"}, "single weights away, not heads, channels or layers"),
        ({"attention": ("mha", "cross_layer")}, {"heads_kept": 0.5}, "the keys away that cross_layer attention borr"),
        ({"attention": ("mha", "cross_layer")}, {"layers_kept": 0.5}, "layers that are all alike, and these differ"),
        ({"ffn_ratio": (1, 2)}, {"layers_kept": 0.5}, "layers that are all alike, and these differ"),
        ({"feedforward": "none"}, {"channels_kept": 0.5}, "nothing to take away: no layer has a feed-forward"),
    ],
    ids=str,
)
def test_what_cannot_be_taken_is_refused(architecture: dict[str, object], kept: dict[str, Value], words: str):
    with pytest.raises(Rejected, match=words):
        STRUCTURED.shape(shape_of(**architecture), ALL | kept)
