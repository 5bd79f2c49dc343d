import jax.numpy as jnp
import numpy as np
import pytest

from cosearch.precision import FORMATS

INT8 = FORMATS["int8"]
WEIGHTS = np.array([[1.27, 0.0, -2.54], [-0.635, 0.0, 0.02], [0.004, 0.0, 1.0]], np.float32)
VALUES = np.array([[127, 0, -127], [-64, 0, 1], [0, 0, 50]])  # -63.5 is rounded to even
SCALE = [0.01, 0.0, 0.02]


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_a_matrix_by_hand(layout: str):
    stored = INT8.pack(WEIGHTS, layout)
    np.testing.assert_array_equal(stored["values"], VALUES if layout == "in_out" else VALUES.T)
    np.testing.assert_allclose(stored["scale"], SCALE, rtol=1e-6)
    assert stored["values"].flags.c_contiguous
    np.testing.assert_allclose(INT8.unpack(stored, layout), VALUES * np.array(SCALE), rtol=1e-6)


def test_bits_count_the_scales():
    assert INT8.bits_per_weight(64, 10) == 8.5
    assert FORMATS["bfloat16"].bits_per_weight(64, 10) == 16


def test_a_cache_has_a_scale_for_each_token_and_head():
    x = jnp.asarray([[[[1.27, -0.01]], [[0.0, 0.0]], [[254.0, 2.0]]]], jnp.float32)
    stored = INT8.encode(x)
    assert stored["values"].tolist() == [[[[127, -1]], [[0, 0]], [[127, 1]]]]
    np.testing.assert_allclose(stored["scale"], [[[[0.01]], [[0.0]], [[2.0]]]], rtol=1e-6)


def test_verification_s_format_is_no_choice_for_candidates():
    form = FORMATS["float64"]
    assert not (form.weights or form.cache or form.activations)
