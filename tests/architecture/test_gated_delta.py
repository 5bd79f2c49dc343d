from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosearch.architecture import cache as kv
from cosearch.architecture.attention import delta_rule
from cosearch.architecture.decoder import bind, pack, plain_decoder, random_weights
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices
from cosearch.precision import Precision
from cosearch.testing import check_attention

BATCH, HEADS, SIZE = 2, 3, 8


def drawn(tokens: int) -> tuple[jax.Array, ...]:
    """Query, key, value, fade and rate of `tokens`, and a state before them."""
    rng = np.random.default_rng(tokens)
    query, key, value = rng.standard_normal((3, BATCH, tokens, HEADS, SIZE))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    fade, rate = -rng.exponential(0.3, (BATCH, tokens, HEADS)), rng.uniform(0, 1, (BATCH, tokens, HEADS))
    state = rng.standard_normal((BATCH, HEADS, SIZE, SIZE))
    return tuple(map(jnp.asarray, (query, key, value, fade, rate, state)))


def one_by_one(*tokens: jax.Array, lowering: str = "dot") -> tuple[jax.Array, jax.Array]:
    *inputs, state = tokens
    out = []
    for at in range(inputs[0].shape[1]):
        query, key, value, fade, rate = (x[:, at] for x in inputs)
        one, state = delta_rule.step(query, key, value, fade, rate, state, lowering)
        out.append(one)
    return jnp.stack(out, axis=1), state


def test_the_contract_is_kept_also_by_wider_heads():
    check_attention("gated_delta", {"head_dim": 32})


def test_a_step_is_the_rule_as_it_is_written():
    with jax.enable_x64(True):
        *tokens, state = drawn(1)
        query, key, value, fade, rate = (x[:, 0] for x in tokens)
        out, after = delta_rule.step(query, key, value, fade, rate, state)
        a, b, k, v = np.exp(fade[0, 0]), rate[0, 0], key[0, 0], value[0, 0]
        # In the order of the paper, where a state is [E, D].
        expected = a * np.asarray(state[0, 0]).T @ (np.eye(SIZE) - b * np.outer(k, k)) + b * np.outer(v, k)
        np.testing.assert_allclose(after[0, 0].T, expected, atol=1e-12)
        np.testing.assert_allclose(out[0, 0], expected @ query[0, 0], atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("empty", [True, False])
def test_chunks_give_what_steps_give(tokens: int, empty: bool):
    with jax.enable_x64(True):
        *inputs, state = drawn(tokens)
        state = state * (not empty)
        expected_out, expected_state = one_by_one(*inputs, state)
        out, state = jax.jit(delta_rule.chunked)(*inputs, state)
        np.testing.assert_allclose(out, expected_out, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(state, expected_state, rtol=1e-9, atol=1e-9)


def test_chunks_give_what_steps_give_where_all_keys_are_one():
    """A series of powers of the triangular matrix would be off by many orders of magnitude here."""
    query, key, value, fade, rate, state = (x.astype(jnp.float32) for x in drawn(64))
    key, fade, rate = jnp.broadcast_to(key[:, :1], key.shape), jnp.zeros_like(fade), jnp.ones_like(rate)
    expected_out, expected_state = one_by_one(query, key, value, fade, rate, state)
    out, state = jax.jit(delta_rule.chunked)(query, key, value, fade, rate, state)
    np.testing.assert_allclose(out, expected_out, atol=1e-4)
    np.testing.assert_allclose(state, expected_state, atol=1e-4)


def test_a_state_that_fades_at_once_has_finite_gradients():
    query, key, value, _, rate, state = (x.astype(jnp.float32) for x in drawn(40))

    def loss(fade: jax.Array) -> jax.Array:
        return delta_rule.chunked(query, key, value, fade, rate, state)[0].sum()

    gradient = jax.jit(jax.grad(loss))(jnp.full(rate.shape, -1e4, jnp.float32))
    assert np.isfinite(gradient).all()


def test_both_lowerings_of_a_step_are_the_same_mathematics():
    with jax.enable_x64(True):
        for dot, multiply_reduce in zip(
            one_by_one(*drawn(3)), one_by_one(*drawn(3), lowering="multiply_reduce"), strict=True
        ):
            np.testing.assert_allclose(dot, multiply_reduce, rtol=1e-12)


SHAPE = DecoderShape.of(Choices({"width": 64, "depth": 2, "head_dim": 16, "ffn_ratio": 1, "attention": "gated_delta"}))


@pytest.fixture
def prefill() -> Callable[..., tuple[jax.Array, list]]:
    model = plain_decoder(SHAPE)
    run = jax.jit(lambda params, *arguments: bind(model, params).prefill(*arguments))
    return partial(run, pack(model, random_weights(SHAPE, 0)))


def test_the_cache_is_as_large_for_any_context():
    model = plain_decoder(SHAPE)
    assert model.cache_spec(2, 100) == model.cache_spec(2, 1000)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(kv.zeros(model.cache_spec(2, 1000))))
    assert size == 2 * 2 * 4 * (4 * 16 * 16 + 3 * 3 * 64)  # depth, batch, bytes; states, and inputs of convolutions


def test_padding_leaves_no_trace(prefill: Callable[..., tuple[jax.Array, list]]):
    empty, rng = kv.zeros(plain_decoder(SHAPE).cache_spec(1, 64)), np.random.default_rng(0)
    tokens = rng.integers(0, 256, (1, 40), dtype=np.int32)
    for length in (1, 2, 35):
        padded = tokens.copy()
        padded[:, length:] = 7
        cut, other = (prefill(empty, piece, np.int32(0), np.int32(length)) for piece in (tokens, padded))
        jax.tree.map(np.testing.assert_array_equal, cut, other)


def test_a_prefill_at_zero_begins_anew(prefill: Callable[..., tuple[jax.Array, list]]):
    spec, tokens = plain_decoder(SHAPE).cache_spec(1, 64), np.arange(10, dtype=np.int32)[None]
    full = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 3, leaf.dtype), spec)
    anew, first = (prefill(cache, tokens, np.int32(0), np.int32(10)) for cache in (full, kv.zeros(spec)))
    jax.tree.map(np.testing.assert_array_equal, anew, first)
    later, _ = prefill(full, tokens, np.int32(5), np.int32(10))
    assert not np.allclose(later, first[0])


def test_states_are_float32_where_activations_are_bfloat16():
    model = plain_decoder(SHAPE, Precision("bfloat16", "bfloat16", "bfloat16"))
    params = pack(model, random_weights(SHAPE, 0))
    spec = model.cache_spec(1, 8)
    assert {leaf.dtype for leaf in jax.tree.leaves(spec)} == {jnp.dtype("float32")}
    step = jax.jit(lambda p, c, t: bind(model, p).decode_step(c, t, jnp.int32(0)))
    logits, cache = step(params, kv.zeros(spec), np.array([65], np.int32))
    assert np.isfinite(logits).all()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cache) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), spec
    )
