import ml_dtypes
import numpy as np
import pytest

from cosearch.precision import FORMATS
from cosearch.precision.codes import FLOAT4, INT4, Code

MXFP4 = FORMATS["mxfp4"]


def test_bytes_by_hand():
    # absmax 7 is between 4 and 8: the scale is 2^(2 - 2), stored as 127, and 7 is cut off to 6.
    weights = np.zeros((64, 1), np.float32)
    weights[[0, 1, 2, 16, 17], 0] = 7, -1.5, 0.5, -4, 3
    # absmax 0.75 = 1.5 * 2^-1: the scale is 2^-3, stored as 124; 0.75 is 6 of them, 0.0625 half of one.
    weights[[32, 48], 0] = 0.75, -0.0625
    stored = MXFP4.pack(weights, "in_out")
    assert stored["scale"].tolist() == [[127], [124]]
    # Codes: 6 is 7, -1.5 is 3 + 8, 0.5 is 1, -4 is 6 + 8, 3 is 5, -0.5 is 1 + 8.
    assert stored["values"].ravel().tolist() == [0xE7, 0x5B, 0x01, *[0] * 13, 0x97, *[0] * 15]
    back = MXFP4.unpack(stored, "in_out").ravel()
    assert back[[0, 1, 2, 16, 17, 32, 48]].tolist() == [6, -1.5, 0.5, -4, 3, 0.75, -0.0625]


def test_codes_are_those_of_ml_dtypes():
    values = np.linspace(-8, 8, 1025, dtype=np.float32)
    theirs = values.clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    ours = FLOAT4.decode(FLOAT4.encode(values), np.float32)
    np.testing.assert_array_equal(ours, theirs.astype(np.float32))
    np.testing.assert_array_equal(
        FLOAT4.decode(np.arange(16, dtype=np.uint8), np.float32),
        [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6],
    )


@pytest.mark.parametrize("code", [FLOAT4, INT4])
def test_each_value_has_its_own_code(code: Code):
    codes = np.arange(16, dtype=np.uint8)
    values = np.unique(code.decode(codes, np.float32).clip(-code.limit, code.limit))
    assert len(values) == 15
    np.testing.assert_array_equal(code.decode(code.encode(values), np.float32), values)


def test_the_scale_is_the_power_of_two_below():
    sizes = np.array([1.0, 1.999, 2.0, 3.999, 4.0, 1e-30, 1e30], np.float32)
    weights = np.tile(sizes, (32, 1))
    assert (MXFP4.pack(weights, "in_out")["scale"][0] - 127.0 + 2).tolist() == np.floor(np.log2(sizes)).tolist()
    # Never 0, which would be a denormal float32.
    assert MXFP4.pack(np.zeros((32, 1), np.float32), "in_out")["scale"].tolist() == [[1]]
