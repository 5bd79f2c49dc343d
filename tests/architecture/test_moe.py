from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cosearch.architecture.feedforward import moe
from cosearch.architecture.feedforward.moe import MoEShape
from cosearch.architecture.linear import Linear, MatrixStorage
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices
from cosearch.core.errors import Rejected

WIDTH = 16
SHAPES = [MoEShape(4, 2, 16, 32), MoEShape(1, 1, 16, 0), MoEShape(5, 1, 8, 16), MoEShape(3, 3, 8, 8)]
FAST = {"xla_backend_optimization_level": 0}
"""Compiles in less time, and tests run once what they compile."""
Matrices = dict[str, jax.Array]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def matrices_of(shape: MoEShape, favourite: int | None = None) -> Matrices:
    """Random ones; every token that `tokens` makes chooses the `favourite` expert first."""
    rng = np.random.default_rng(0)
    found = {name: rng.standard_normal(sizes) / sizes[-2] ** 0.5 for name, sizes in shape.linears(WIDTH).items()}
    if favourite is not None:
        found["router"][0, favourite] = 100.0
    return {name: jnp.asarray(matrix) for name, matrix in found.items()}


def tokens(count: int) -> jax.Array:
    x = np.random.default_rng(1).standard_normal((count, WIDTH))
    x[:, 0] = 1.0
    return jnp.asarray(x)


def linears_of(matrices: Matrices, observed: bool = False) -> Mapping[str, Linear]:
    found = {}
    for name, matrix in matrices.items():
        found[name] = Linear(matrix.shape, MatrixStorage("float64", observed=observed))
        values: Any = nnx.Param(matrix)
        found[name].stored = nnx.Dict({"values": values})
    return found


def routed(shape: MoEShape, x: jax.Array, matrices: Matrices) -> jax.Array:
    return shape(x, linears_of(matrices))


sparse = jax.jit(routed, static_argnums=0, compiler_options=FAST)


def dense(shape: MoEShape, x_TW: jax.Array, matrices: Matrices) -> jax.Array:
    """The same by every expert for every token, weighted with zero where it is not chosen."""
    chance_TE = jax.nn.softmax(x_TW @ matrices["router"])
    expert_TK = jax.lax.top_k(chance_TE, shape.chosen)[1]
    chosen_TE = jax.nn.one_hot(expert_TK, shape.experts, dtype=x_TW.dtype).sum(1)
    weight_TE = moe.balanced(chance_TE, chosen_TE.mean(0) / shape.chosen) * chosen_TE
    if shape.chosen > 1:
        weight_TE /= weight_TE.sum(1, keepdims=True)
    gate, up = (jnp.einsum("tw,ewf->tef", x_TW, matrices[name]) for name in ("gate", "up"))
    out = jnp.einsum("tef,efw,te->tw", jax.nn.silu(gate) * up, matrices["down"], weight_TE)
    if shape.shared_hidden:
        hidden = jax.nn.silu(x_TW @ matrices["shared_gate"]) * (x_TW @ matrices["shared_up"])
        out += hidden @ matrices["shared_down"]
    return out


@partial(jax.jit, static_argnums=(0, 1), compiler_options=FAST)
def graded(run: Callable, shape: MoEShape, x: jax.Array, matrices: Matrices) -> tuple[jax.Array, tuple]:
    """What `run` gives, and the gradients of its product with something, so that none is zero by symmetry."""
    out, pull = jax.vjp(partial(run, shape), x, matrices)
    return out, pull(jnp.cos(jnp.arange(x.size)).reshape(x.shape))


@pytest.mark.parametrize("count", [1, 8, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_what_all_experts_give_masked_and_so_is_its_gradient(shape: MoEShape, count: int):
    for favourite in (None, 0):
        x, matrices = tokens(count), matrices_of(shape, favourite)
        (out, gradients), (expected, expected_gradients) = (graded(run, shape, x, matrices) for run in (routed, dense))
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
        for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * count)


def test_the_router_learns_also_where_one_expert_is_chosen():
    for shape in (MoEShape(4, 2, 16, 32), MoEShape(5, 1, 8, 16)):
        _, (_, gradient) = graded(routed, shape, tokens(8), matrices_of(shape))
        assert np.abs(gradient["router"]).max() > 0.1


@pytest.mark.parametrize("count", [1, 40])
def test_no_choice_is_dropped_and_every_block_is_of_one_expert(count: int):
    rng = np.random.default_rng(count)
    for experts, rows in ((1, 4), (5, 8), (64, 1)):
        for expert_A in (rng.integers(0, experts, count), np.full(count, experts - 1)):
            blocks = jax.jit(moe.lay_out, static_argnums=(1, 2))(jnp.asarray(expert_A), experts, rows)
            choice_NR, needed_N = np.asarray(blocks.choice_NR), np.asarray(blocks.needed_N)
            assert (choice_NR.reshape(-1)[blocks.place_A] == np.arange(count)).all()
            assert (expert_A == np.asarray(blocks.expert_N)[np.asarray(blocks.place_A) // rows]).all()
            assert set(np.asarray(blocks.place_A) // rows) == set(np.flatnonzero(needed_N))
            assert len(needed_N) <= count // rows + experts


@pytest.mark.parametrize("count", [1, 8, 300])
def test_only_the_experts_that_are_chosen_are_read(count: int):
    shape = MoEShape(4, 2, 16, 0)
    matrices = matrices_of(shape)
    matrices["router"] = matrices["router"].at[0].set(jnp.array([0.0, 100.0, 0.0, 200.0]))
    poisoned = {name: m if name == "router" else m.at[jnp.array([0, 2])].set(jnp.nan) for name, m in matrices.items()}
    out = sparse(shape, tokens(count), poisoned)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out, sparse(shape, tokens(count), matrices))


def test_a_token_does_not_depend_on_the_others():
    shape = SHAPES[0]
    matrices, x = matrices_of(shape), tokens(300).reshape(3, 100, WIDTH)
    out = sparse(shape, x, matrices)
    assert out.shape == x.shape
    for row, column in ((0, 0), (1, 50), (2, 99)):
        alone = sparse(shape, x[row, column], matrices)
        np.testing.assert_allclose(alone, out[row, column], rtol=0, atol=1e-12)


def test_half_precision_in_gives_half_precision_out():
    shape = SHAPES[0]
    matrices, x = matrices_of(shape), tokens(40).astype(jnp.bfloat16)
    out = sparse(shape, x, matrices)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(float), dense(shape, x.astype(float), matrices), rtol=0, atol=0.1)


def test_experts_are_observed_with_their_own_tokens():
    shape = SHAPES[0]
    matrices, x = matrices_of(shape), tokens(40)

    @partial(jax.jit, compiler_options=FAST)
    def observed(x: jax.Array) -> tuple[jax.Array, Matrices]:
        linears = linears_of(matrices, observed=True)
        return shape(x, linears), {name: linear.moment[...] for name, linear in linears.items()}

    out, moments = observed(x)
    np.testing.assert_allclose(out, sparse(shape, x, matrices), rtol=0, atol=1e-12)
    expert_TK = jax.lax.top_k(x @ matrices["router"], 2)[1]
    for expert in range(4):
        own = np.asarray(x[(expert_TK == expert).any(1)])
        hidden = np.asarray(jax.nn.silu(own @ matrices["gate"][expert]) * (own @ matrices["up"][expert]))
        for name, seen in (("gate", own), ("up", own), ("down", hidden)):
            np.testing.assert_allclose(moments[name][expert], seen.T @ seen / 40, rtol=1e-4, atol=1e-6)
    assert all(moments[name].shape == (WIDTH, WIDTH) for name in ("router", "shared_gate", "shared_up"))


def test_what_a_step_reads():
    shape = MoEShape(8, 2, 16, 16)
    assert [shape.read_fraction("gate", count) for count in (1, 2, 4, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert shape.read_fraction("router", 1) == shape.read_fraction("shared_down", 1) == 1.0


def test_more_experts_than_there_are_cannot_be_chosen():
    with pytest.raises(Rejected, match="cannot choose 5 of 4 experts"):
        DecoderShape.of(Choices({"feedforward": "moe", "experts": 4, "experts_per_token": 5}))


def test_sizes_follow_the_width():
    layer = DecoderShape.of(Choices({"width": 64, "feedforward": "moe", "shared_ratio": 0, "experts": 8})).layers[0]
    assert layer.feedforward == MoEShape(8, 2, 64, 0)
    assert isinstance(layer.feedforward, MoEShape)
    assert "shared_gate" not in layer.feedforward.linears(64)
