import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosearch.schedule import matmul
from cosearch.schedule.matmul import contract, multiply_reduce, take_columns

SIZES = st.sampled_from((1, 1, 2, 3))


@st.composite
def products(draw: st.DrawFn) -> tuple[str, np.ndarray, np.ndarray]:
    """Subscripts of two factors: axes of both that are summed or kept, and axes of one that are kept."""
    size = {axis: draw(SIZES) for axis in "abcdef"}
    summed, kept, left, right = draw(st.sampled_from(("", "a", "ab"))), draw(st.sampled_from(("", "c"))), "d", "ef"
    x_axes = draw(st.permutations([*summed, *kept, *left]))
    large_axes = draw(st.permutations([*summed, *kept, *right]))
    result = draw(st.permutations([*kept, *left, *right]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x, large = (rng.standard_normal([size[a] for a in axes]).astype(np.float32) for axes in (x_axes, large_axes))
    return f"{''.join(x_axes)},{''.join(large_axes)}->{''.join(result)}", x, large


@settings(max_examples=25, deadline=None)
@given(products())
def test_multiply_reduce_is_einsum(product: tuple[str, np.ndarray, np.ndarray]):
    subscripts, x, large = product
    out = multiply_reduce(subscripts, jnp.asarray(x), jnp.asarray(large))
    expected = np.einsum(subscripts, x.astype(np.float64), large.astype(np.float64))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("rows", [1, matmul.MOST_ROWS, matmul.MOST_ROWS + 1])
@pytest.mark.parametrize("layout", matmul.LAYOUTS)
def test_products_on_either_side_of_the_limit_on_rows(rows: int, layout: str):
    rng = np.random.default_rng(0)
    x, matrix = rng.standard_normal((rows, 8)).astype(np.float32), rng.integers(-127, 128, (8, 5), dtype=np.int8)
    stored = jnp.asarray(matrix if layout == "in_out" else matrix.T)
    for lowering in matmul.MATMULS:
        out = contract(jnp.asarray(x), stored, layout, lowering)
        assert (out.shape, out.dtype) == ((rows, 5), jnp.float32)
        np.testing.assert_allclose(out, x @ matrix.astype(np.float64), rtol=1e-4, atol=1e-3)


def test_narrow_products_are_summed_in_float32():
    x, matrix = jnp.ones((1, 1024), jnp.bfloat16), jnp.ones((1024, 2), jnp.bfloat16)
    for lowering in matmul.MATMULS:
        assert contract(x, matrix, "in_out", lowering, out_dtype=jnp.float32).tolist() == [[1024.0, 1024.0]]
        assert contract(x[None], matrix, "in_out", lowering).dtype == jnp.bfloat16


def test_products_of_integers_stay_whole():
    x, matrix = jnp.full((1, 8), 100, jnp.int8), jnp.full((8, 2), 100, jnp.int8)
    for lowering in matmul.MATMULS:
        out = contract(x, matrix, "in_out", lowering)
        assert (out.dtype, out.tolist()) == (jnp.int32, [[80_000, 80_000]])


@pytest.mark.parametrize("layout", matmul.LAYOUTS)
def test_columns_are_taken_in_the_order_of_the_indices(layout: str):
    matrix = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    taken = take_columns(jnp.asarray(matrix if layout == "in_out" else matrix.T), jnp.asarray([[3, 0]]), layout)
    assert taken.tolist() == [[[3.0, 7.0, 11.0], [0.0, 4.0, 8.0]]]
