"""What holds of every compression: of N:M and of blocks, alone, in stacks and in number formats."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from cosearch import testing
from cosearch.architecture.decoder import random_weights
from cosearch.architecture.linear import Compression, Linear, MatrixStorage
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices
from cosearch.core.errors import Rejected
from cosearch.schedule.matmul import LAYOUTS, MATMULS
from cosearch.sparsity import PATTERNS
from cosearch.sparsity.block import BlockCompression
from cosearch.sparsity.n_m import NMCompression

COMPRESSIONS = (NMCompression(2, 4), NMCompression(4, 8), NMCompression(1, 4), BlockCompression(4, 0.5))


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """Matrices of few different values, so that magnitudes tie and many are zero."""
    rows, columns = 16 * draw(st.integers(1, 4)), 4 * draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    top = draw(st.sampled_from((0, 1, 2, 1000)))
    return rng.integers(-top, top + 1, (rows, columns)).astype(np.float32)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(matrices(), st.sampled_from(COMPRESSIONS), st.sampled_from(LAYOUTS))
def test_expanding_gives_the_weights_that_stay_and_compressing_those_again_the_same(
    weights: np.ndarray, compression: Compression, layout: str
):
    rows, columns = weights.shape
    assert compression.why_not(rows, columns) is None
    values, indices = compression.compress(weights, layout)
    assert values.shape == (compression.stored_rows(rows), columns)
    spec = compression.indices(rows, columns, layout)
    assert (indices.shape, indices.dtype) == (spec.shape, spec.dtype)
    whole = compression.expand(values, indices, rows, layout)
    left = whole != 0
    np.testing.assert_array_equal(whole[left], weights[left])
    assert left.sum() == (values != 0).sum()
    again = compression.compress(whole, layout)
    np.testing.assert_array_equal(compression.expand(*again, rows, layout), whole)


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=str)
@pytest.mark.parametrize("form", ["int8", "int4_g32"])
def test_values_are_packed_by_a_number_format_like_any_matrix(compression: Compression, form: str):
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((128, 12)).astype(np.float32)
    for layout in LAYOUTS:
        for lowering in MATMULS:
            storage = MatrixStorage(form, layout, lowering, compression=compression)
            assert storage.why_not(weights.shape) is None
            stored = storage.pack(weights)
            whole = storage.unpack(stored, weights.shape)
            assert storage.bits(weights.shape) == 8 * sum(array.nbytes for array in stored.values())
            kept = compression.expand(*compression.compress(weights, layout), 128, layout)
            step = np.abs(weights).max() / (127 if form == "int8" else 7)
            assert np.abs(whole - kept).max() < 0.6 * step
            np.testing.assert_array_equal(whole[kept == 0], 0)
            linear = Linear(weights.shape, storage)
            for part, array in stored.items():
                linear.stored[part] = nnx.Param(jnp.asarray(array))
            dense = jax.jit(linear.matrix, static_argnums=0)
            np.testing.assert_allclose(dense("float32"), whole, rtol=1e-6)
            assert "dot" not in dense.lower("float32").as_text()  # it is no product with an identity
            for rows in (1, 3, 20):
                x = rng.standard_normal((rows, 128)).astype(np.float32)
                np.testing.assert_allclose(jax.jit(linear)(x), x @ whole, atol=1e-4)


def test_a_format_that_cannot_hold_the_stored_rows_is_refused():
    storage = MatrixStorage("int4_g32", compression=NMCompression(2, 4))
    assert storage.why_not((64, 8)) is None
    assert "groups of 32 do not divide 24 rows" in str(storage.why_not((48, 8)))
    for refused in (lambda: storage.spec((3, 48, 8)), lambda: storage.pack(np.ones((48, 8), np.float32))):
        with pytest.raises(Rejected, match="int4_g32 does not hold it: groups of 32 do not divide 24 rows"):
            refused()
    with pytest.raises(Rejected, match="groups of 4 do not divide 18 inputs"):
        MatrixStorage(compression=NMCompression(2, 4)).pack(np.ones((18, 8), np.float32))
    assert "are not multiplied with compressed weights" in str(
        MatrixStorage("int8", inputs="int8", compression=NMCompression(2, 4)).why_not((64, 8))
    )


def test_nan_is_not_hidden_by_leaving_it_out():
    weights = np.ones((16, 16), np.float32)
    weights[3, 5] = np.nan
    for compression in COMPRESSIONS:
        with pytest.raises(Rejected, match="float32 does not hold it: weights hold NaN"):
            MatrixStorage(compression=compression).pack(weights)


@dataclass(frozen=True)
class Stacked(DecoderShape):
    """A decoder with a stack of matrices and a router, whatever its layers are."""

    def linears(self) -> dict[str, tuple[int, ...]]:
        return {"experts": (3, 16, 4), "layers.0.feedforward.router": (10, 3), "embedding": (6, 256)}


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_the_matrices_of_a_stack_are_pruned_one_by_one_and_router_and_embedding_not_at_all(criterion: str):
    pattern, choices, shape = PATTERNS["n_m"], {"n_m": "2:4", "criterion": criterion}, Stacked(16, ())
    rng = np.random.default_rng(4)
    weights = {path: rng.standard_normal(sizes) for path, sizes in shape.linears().items()}
    moments = testing.random_moments(shape) if criterion != "magnitude" else {}
    pruned = pattern.prune(weights, shape, choices, moments)
    for index in range(3):
        one = {**weights, "experts": weights["experts"][[index]]}
        own = {path: moment[[index]] if path == "experts" else moment for path, moment in moments.items()}
        alone = pattern.prune(one, shape, choices, own)["experts"]
        np.testing.assert_array_equal(pruned["experts"][[index]], alone)
    assert all(pruned[path] is weights[path] for path in weights if path != "experts")


@pytest.mark.parametrize(
    "choices",
    [
        {"n_m": "1:4", "criterion": "sparsegpt"},
        {"n_m": "4:8", "criterion": "wanda"},
    ],
    ids=str,
)
def test_other_choices_of_n_m_keep_the_contract(choices: dict[str, str]):
    testing.check_pattern("n_m", choices)


def test_other_choices_of_block_keep_the_contract():
    testing.check_pattern("block", {"block": 8, "blocks_kept": 0.25, "criterion": "wanda"})


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_only_sparsegpt_changes_the_weights_that_stay(criterion: str):
    shape = DecoderShape.of(Choices({"width": 32, "depth": 1, "head_dim": 16, "ffn_ratio": 1}))
    pattern, choices = PATTERNS["n_m"], {"n_m": "2:4", "criterion": criterion}
    assert pattern.needs_moments(choices) == (criterion != "magnitude")
    weights, moments = random_weights(shape, 0), testing.random_moments(shape)
    pruned = pattern.prune(weights, shape, choices, moments)
    for path, matrix in pruned.items():
        left = matrix != 0
        same = (matrix[left] == weights[path][left]).mean()
        if path.endswith((".query", ".down")):
            assert left.mean() == 0.5
            assert same < 0.2 if criterion == "sparsegpt" else same == 1
        elif path in ("embedding", "norm"):
            np.testing.assert_array_equal(matrix, weights[path])
