import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosearch.architecture import cache as kv
from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.architecture.decoder import Decoder, bind, pack, params_spec, plain_decoder, random_weights, unpack
from cosearch.architecture.feedforward.mlp import MLPShape
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices
from cosearch.core.errors import Rejected
from cosearch.precision import Precision
from cosearch.schedule import Schedule

SMALL = {"width": 64, "depth": 3, "head_dim": 16, "ffn_ratio": 1}


def shape_of(**choices: object) -> DecoderShape:
    return DecoderShape.of(Choices(SMALL | choices))


def test_values_by_layer_are_repeated_over_the_depth():
    shape = shape_of(attention=("sliding_window", "mqa"), window=(8, 32), kv_heads=2, ffn_ratio=(1, 2, 3))
    assert [layer.attention for layer in shape.layers] == [
        SoftmaxShape(4, 2, 16, window=8),
        SoftmaxShape(4, 1, 16),
        SoftmaxShape(4, 2, 16, window=8),
    ]
    hidden = [64, 128, 192]
    assert [layer.feedforward for layer in shape.layers] == [MLPShape(size, gated=True) for size in hidden]
    assert not shape.uniform
    assert shape_of(attention=("mha", "mha")).uniform


def test_one_head_dim_a_layer():
    matrices = shape_of(head_dim=(16, 32), attention="mqa").linears()
    assert [matrices[f"layers.{index}.attention.key"] for index in range(3)] == [(64, 16), (64, 32), (64, 16)]


@pytest.mark.parametrize(
    "choices",
    [{}, {"attention": "gqa", "kv_heads": 2, "qk_norm": False}, {"attention": ("mqa", "mha"), "ffn_ratio": (1, 3)}],
)
def test_parameters_are_counted_as_they_are_stored(choices: dict[str, object]):
    shape = shape_of(**choices)
    weights = random_weights(shape, 0)
    assert sum(array.size for array in weights.values()) == shape.parameters
    assert sum(spec.size for spec in params_spec(plain_decoder(shape)).values()) == shape.parameters


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"head_dim": 24}, "heads of 24 do not divide a width of 64"),
        ({"attention": "gqa", "kv_heads": 3}, "4 query heads cannot share 3 key/value heads"),
        ({"attention": "gqa", "kv_heads": 8}, "4 query heads cannot share 8 key/value heads"),
        ({"head_dim": 1}, "must be even"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(choices: dict[str, object], words: str):
    with pytest.raises(Rejected, match=words):
        shape_of(**choices)


def test_heads_are_counted_whatever_floats_make_of_their_ratio():
    shape = shape_of(width=1600, heads_ratio=0.55)  # 880.0000000000001 together
    assert shape.linears()["layers.0.attention.query"] == (1600, 880)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_unpack_gives_back_what_was_packed(layers: str):
    shape = shape_of(attention="gqa", kv_heads=2)
    weights = random_weights(shape, 1)
    model = Decoder(shape, Precision(), Schedule(layers=layers, weight_layout="out_in"))
    back = unpack(model, pack(model, weights))
    assert back.keys() == weights.keys()
    for path, array in weights.items():
        np.testing.assert_array_equal(back[path], array)


def test_a_window_bounds_the_cache_and_an_unseen_token_changes_nothing():
    shape = shape_of(depth=1, attention="sliding_window", window=8)
    model = plain_decoder(shape)
    assert {spec.shape for spec in jax.tree.leaves(model.cache_spec(2, 40))} == {(1, 2, 8, 1, 16)}
    assert {spec.shape for spec in jax.tree.leaves(model.cache_spec(2, 5))} == {(1, 2, 5, 1, 16)}
    params = pack(model, random_weights(shape, 2))
    tokens = np.arange(20, dtype=np.int32)[None].repeat(2, axis=0)
    tokens[1, 10] = 99
    first, second = np.asarray(jax.jit(lambda p: bind(model, p).score(jnp.asarray(tokens)))(params))
    seen = np.abs(first - second).max(axis=1) > 0
    assert seen.tolist() == [10 <= position < 18 for position in range(20)]


def test_layers_of_two_kinds_and_a_quantised_cache_decode_as_they_score():
    shape = shape_of(depth=2, attention=("sliding_window", "mqa"), window=8, kv_heads=2)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 20), dtype=np.int32)
    with jax.enable_x64(True):
        schedule = Schedule(layers="unroll", cache_layout="bhds", attention="multiply_reduce")
        model = Decoder(shape, Precision("int8", "int8", "float64"), schedule)
        params = pack(model, random_weights(shape, 3))
        score = np.asarray(jax.jit(lambda p: bind(model, p).score(jnp.asarray(tokens)))(params))
        step = jax.jit(lambda p, c, t, position: bind(model, p).decode_step(c, t, position))
        cache = kv.zeros(model.cache_spec(2, 20))
        for position in range(20):
            logits, cache = step(params, cache, tokens[:, position], np.int32(position))
            np.testing.assert_allclose(logits, score[:, position], atol=1e-9 * np.abs(score).max())
