"""What float8, bfloat16 and float32 make of what is too large, too small, and not a number."""

import jax.numpy as jnp
import numpy as np
import pytest

from cosearch.core.errors import Rejected
from cosearch.precision import FORMATS
from cosearch.precision.codes import FLOAT8


def test_float8_saturates_and_makes_no_nan():
    codes = FLOAT8.encode(np.array([448, 449, 464, 465, 1e30, -1e30, 2.0**-9, 2.0**-10, 2.0**-11], np.float32))
    expected = [448, 448, 448, 448, 448, -448, 2.0**-9, 0, 0]
    assert codes.astype(np.float64).tolist() == expected
    assert FLOAT8.encode(jnp.asarray([465, 1e30, -np.inf])).astype(np.float32).tolist() == [448, 448, -448]
    form = FORMATS["float8_e4m3"]
    stored = form.pack(np.array([[2.0], [-3.0], [1.0]], np.float32), "in_out", np.array([[1 / 448]], np.float32))
    np.testing.assert_allclose(form.unpack(stored, "in_out"), [[1], [-1], [1]], rtol=1e-6)


def test_bfloat16_overflows_to_infinity_only_where_float32_nearly_does():
    form = FORMATS["bfloat16"]
    largest = float(jnp.finfo(jnp.bfloat16).max)
    back = form.unpack(form.pack(np.array([[largest, 3.4e38]], np.float32), "in_out"), "in_out")
    assert back.tolist() == [[largest, np.inf]]


@pytest.mark.parametrize("name", [name for name in FORMATS.names() if FORMATS[name].weights])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(name: str, bad: float):
    weights = np.ones((128, 2), np.float32)
    weights[5, 1] = bad
    with pytest.raises(Rejected, match="NaN or infinities"):
        FORMATS[name].pack(weights, "in_out")


@pytest.mark.parametrize(
    ("name", "column", "least"),
    [
        ("int8", [127, 0.5, 3.5], 0.99),
        ("int4_g32", [7 * 257 / 256, 0.5 * 257 / 256, 3.48], 0.98),
        ("float8_e4m3", [448, 17, 2.0**-10], 0.99),
        ("mxfp4", [7.99, 2.5, 0.25], 0.99),
        ("nvfp4", [6, 5, 2.5], 0.99),
        ("bfloat16", [1 + 2.0**-8, 1, 1], 0.99),
    ],
)
def test_bounds_are_reached(name: str, column: list[float], least: float):
    form, weights = FORMATS[name], np.zeros((32, 1), np.float32)
    weights[: len(column), 0] = column
    off = abs(form.unpack(form.pack(weights, "in_out"), "in_out") - weights)
    bound = form.bound(weights)
    assert (off <= bound).all()
    assert (off[:3] / bound[:3]).max() >= least
