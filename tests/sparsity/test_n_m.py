import numpy as np
import pytest

from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices
from cosearch.core.errors import Rejected
from cosearch.sparsity import PATTERNS
from cosearch.sparsity.n_m import NMCompression


def test_the_places_of_four_groups_of_2_4_share_a_byte():
    # Group g keeps the inputs `places[g]`; its weights are 10 g + the input.
    places = [(0, 1), (2, 3), (1, 3), (0, 2)]
    weights = np.zeros((16, 1), np.float32)
    for group, inputs in enumerate(places):
        for at in inputs:
            weights[4 * group + at] = 10 * group + at + 1
    values, indices = NMCompression(2, 4).compress(weights, "in_out")
    np.testing.assert_array_equal(values[:, 0], [1, 13, 22, 31, 2, 14, 24, 33])
    np.testing.assert_array_equal(indices[:, 0], [0b00_01_10_00, 0b10_11_11_01])
    assert indices.dtype == np.uint8


def test_the_places_of_two_groups_of_4_8_share_a_byte():
    weights = np.zeros((32, 1), np.float32)
    for group, inputs in enumerate([(0, 1, 2, 3), (4, 5, 6, 7), (0, 2, 4, 6), (1, 3, 5, 7)]):
        for at in inputs:
            weights[8 * group + at] = 1
    _, indices = NMCompression(4, 8).compress(weights, "in_out")
    # Byte 2 n + b: weight n of the groups b and b + 2.
    np.testing.assert_array_equal(indices[:, 0], [0x00, 0x14, 0x21, 0x35, 0x42, 0x56, 0x63, 0x77])


def test_the_layout_is_that_of_both_parts():
    weights = np.random.default_rng(0).standard_normal((32, 6))
    compression = NMCompression(1, 4)
    values, indices = compression.compress(weights, "in_out")
    same, turned = compression.compress(weights, "out_in")
    np.testing.assert_array_equal(values, same)  # the format turns the values
    np.testing.assert_array_equal(indices, turned.T)
    assert compression.indices(32, 6, "out_in").shape == (6, 2)


def test_of_equal_weights_the_first_stay():
    compression = NMCompression(2, 4)
    for value in (0.0, -1.0):
        weights = np.full((16, 1), value)
        values, indices = compression.compress(weights, "in_out")
        np.testing.assert_array_equal(indices[:, 0], [0b00_00_00_00, 0b01_01_01_01])
        np.testing.assert_array_equal(compression.expand(values, indices, 16, "in_out")[:4, 0], [value, value, 0, 0])


@pytest.mark.parametrize(
    ("compression", "rows", "words"),
    [
        (NMCompression(2, 4), 18, "groups of 4 do not divide 18 inputs"),
        (NMCompression(2, 4), 24, "4 groups share their bytes of indices, and 6 groups do not fit"),
        (NMCompression(4, 8), 24, "2 groups share their bytes of indices, and 3 groups do not fit"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(compression: NMCompression, rows: int, words: str):
    assert compression.why_not(rows, 7) == words


def test_the_matrix_that_does_not_fit_is_named():
    shape = DecoderShape.of(Choices({"width": 24, "depth": 1, "head_dim": 8, "ffn_ratio": 2}))
    words = r"layers.0.attention.query \[24, 24\] cannot be compressed: 4 groups share their bytes"
    with pytest.raises(Rejected, match=words):
        PATTERNS["n_m"].shape(shape, {"n_m": "2:4", "criterion": "magnitude"})
