import jax.numpy as jnp
import numpy as np
import pytest

from cosearch.architecture.linear import MatrixStorage
from cosearch.precision import FORMATS

INT8 = FORMATS["int8"]
WEIGHTS = np.array([[1.27, 0.0, -2.54], [-0.635, 0.0, 0.02], [0.004, 0.0, 1.0]], np.float32)
VALUES = np.array([[127, 0, -127], [-64, 0, 1], [0, 0, 50]])  # -63.5 is rounded to even
SCALE = np.array([[0.01, 0.0, 0.02]])


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_a_matrix_by_hand(layout: str):
    stored = INT8.pack(WEIGHTS, layout)
    np.testing.assert_array_equal(stored["values"], VALUES if layout == "in_out" else VALUES.T)
    np.testing.assert_allclose(stored["scale"], SCALE if layout == "in_out" else SCALE.T, rtol=1e-6)
    assert stored["values"].flags.c_contiguous
    np.testing.assert_allclose(INT8.unpack(stored, layout), VALUES * SCALE, rtol=1e-6)


def test_a_smaller_scale_cuts_off_what_is_beyond_127():
    stored = INT8.pack(np.array([[1.0], [-1.0], [0.25]], np.float32), "in_out", np.array([[1 / 254]], np.float32))
    assert stored["values"].tolist() == [[127], [-127], [64]]  # 63.5 is rounded to even


def test_bits_count_the_scales():
    assert MatrixStorage("int8").bits((64, 10)) == 8.5 * 640
    assert MatrixStorage("bfloat16").bits((3, 64, 10)) == 16 * 3 * 640


def test_a_cache_has_a_scale_for_each_token_and_head():
    x = jnp.asarray([[[[1.27, -0.01]], [[0.0, 0.0]], [[254.0, 2.0]]]], jnp.float32)
    stored = INT8.encode(x)
    assert stored["values"].tolist() == [[[[127, -1]], [[0, 0]], [[127, 1]]]]
    assert stored["scale"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(stored["scale"], np.float64), [[[[0.01]], [[0.0]], [[2.0]]]], rtol=2**-8)


def test_values_are_rounded_by_the_scale_that_is_stored():
    # 1.5 / 127 becomes 0.0118408 in bfloat16, 0.25 % more; by the scale before that, 1.5 would be 127 of them.
    stored = INT8.encode(jnp.asarray([1.5, 1.4], jnp.float32))
    step = float(stored["scale"][0])
    assert step == 0.0118408203125
    assert stored["values"].tolist() == [round(1.5 / step), round(1.4 / step)]


def test_inputs_are_rounded_by_token():
    weights = np.eye(2, dtype=np.float32)
    stored = {part: jnp.asarray(array) for part, array in INT8.pack(weights, "in_out").items()}
    x = jnp.asarray([[1.27, 0.0149], [0.0, 0.0], [2.54, 0.031]], jnp.float32)
    out = INT8.matmul(x, stored, "in_out", "dot", "int8")
    np.testing.assert_allclose(out, [[1.27, 0.01], [0, 0], [2.54, 0.04]], rtol=1e-6)


def test_verification_s_format_is_no_choice_for_candidates():
    form = FORMATS["float64"]
    assert not (form.weights or form.cache or form.activations)
