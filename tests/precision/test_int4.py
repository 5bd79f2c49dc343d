import jax.numpy as jnp
import numpy as np
import pytest

from cosearch.core.errors import Rejected
from cosearch.precision import FORMATS

G32 = FORMATS["int4_g32"]


def test_bytes_by_hand():
    # Two groups of 32 rows: 7, -7, 1 and 0 at rows 0, 1, 16, 17 of the first, of scale 0.5; the second is of scale 2.
    weights = np.zeros((64, 1), np.float32)
    weights[[0, 1, 16, 17], 0] = 3.5, -3.5, 0.5, 0
    weights[[32, 48, 63], 0] = 14, -14, 4
    stored = G32.pack(weights, "in_out")
    assert np.asarray(stored["scale"], np.float64).tolist() == [[0.5], [2.0]]
    first, second = stored["values"].reshape(2, 16).tolist()
    # A nibble is the value plus 8; row k is the low one of byte k, row k + 16 the high one.
    assert first == [0x9F, 0x81, *[0x88] * 14]
    assert second == [0x1F, *[0x88] * 14, 0xA8]
    transposed = G32.pack(weights, "out_in")
    assert transposed["values"].tolist() == [first + second]
    assert transposed["scale"].shape == (1, 2)


def test_a_cache_is_packed_along_its_last_axis():
    stored = FORMATS["int4"].encode(jnp.asarray([[7.0, -7.0, 3.0, 0.4], [0, 0, 0, 0]], jnp.float32))
    assert stored["values"].tolist() == [[0xBF, 0x81], [0x88, 0x88]]
    assert np.asarray(stored["scale"], np.float64).tolist() == [[1.0], [0.0]]
    with pytest.raises(Rejected, match="two values share a byte, and 5 are odd"):
        FORMATS["int4"].encode(jnp.zeros((2, 5)))


def test_groups_must_divide_the_rows():
    assert G32.why_not(48, 7) == "groups of 32 do not divide 48 rows"
    assert G32.why_not(64, 7) is None
    assert not FORMATS["int4"].weights and not G32.cache
    for refused in (lambda: G32.spec(48, 7, "in_out"), lambda: G32.pack(np.ones((48, 7), np.float32), "out_in")):
        with pytest.raises(Rejected, match="groups of 32 do not divide 48 rows"):
            refused()


def test_products_of_rounded_inputs_are_exact_integers():
    rng = np.random.default_rng(0)
    weights = rng.integers(-7, 8, (64, 6)).astype(np.float32)
    weights[[0, 32]] = 7  # scales of 1
    x = rng.integers(-127, 128, (3, 64)).astype(np.float32)
    x[:, 0] = 127
    for layout in ("in_out", "out_in"):
        stored = {part: jnp.asarray(array) for part, array in G32.pack(weights, layout).items()}
        for lowering in ("dot", "multiply_reduce"):
            np.testing.assert_array_equal(G32.matmul(jnp.asarray(x), stored, layout, lowering, "int8"), x @ weights)
