import numpy as np

from cosearch.precision import FORMATS

NVFP4 = FORMATS["nvfp4"]


def test_bytes_by_hand():
    # The largest weight of all, 2688 = 6 * 448, makes the matrix's scale 1, and its group's 448.
    weights = np.zeros((32, 1), np.float32)
    weights[[0, 1, 8], 0] = 2688, -448, 224
    # A group of absmax 6.2: 6.2 / 6 = 1.033 becomes 1 (float8 has 1 and 1.125), so that 6.2 is cut off to 6.
    weights[[16, 17, 24], 0] = 6.2, -2.4, 3.6
    stored = NVFP4.pack(weights, "in_out")
    assert stored["tensor_scale"].tolist() == [[1.0]] and stored["tensor_scale"].dtype == np.float32
    assert stored["scale"].view(np.uint8).tolist() == [[0b0_1111_110], [0b0_0111_000]]
    # 6, -1 and 0.5 are codes 7, 2 + 8 and 1; 6, -2 and 4 are 7, 4 + 8 and 6.
    assert stored["values"].ravel().tolist() == [0x17, 0x0A, *[0] * 6, 0x67, 0x0C, *[0] * 6]
    assert NVFP4.unpack(stored, "in_out")[[0, 1, 8, 16, 17, 24], 0].tolist() == [2688, -448, 224, 6, -2, 4]


def test_groups_far_below_the_largest_are_zeros():
    weights = np.ones((48, 1), np.float32)
    weights[16:32] = 2.0**-17
    weights[32:] = 2.0**-20
    back = NVFP4.unpack(NVFP4.pack(weights, "out_in"), "out_in").ravel()
    assert (abs(back[16:32] - 2.0**-17) <= 2.0**-17 / 3).all() and (back[32:] == 0).all()
    assert (abs(back - weights.ravel()) <= NVFP4.bound(weights).ravel()).all()


def test_a_matrix_of_zeros():
    stored = NVFP4.pack(np.zeros((16, 2), np.float32), "in_out")
    assert not NVFP4.unpack(stored, "in_out").any() and not NVFP4.bound(np.zeros((16, 2))).any()
