import jax.numpy as jnp
import numpy as np
import pytest

from cosearch.core.errors import Rejected
from cosearch.measure.operation import MAKERS, time_operation


def test_every_kind_computes_what_it_is_named_for() -> None:
    x, weights, run = MAKERS["gemm"](dtype="bfloat16", m=4, n=8, k=16)
    np.testing.assert_allclose(run(x, weights), (x @ weights.T), rtol=0.02, atol=0.02)
    query, keys, run = MAKERS["attn_context"](batch=2, tokens=8, heads=4, kv_heads=2, head_dim=16)
    first = run(query, keys)[:, 0]
    np.testing.assert_allclose(first, jnp.repeat(keys[1][:, 0], 2, axis=1), rtol=0.02, atol=0.02)
    query, keys, run = MAKERS["attn_generation"](batch=2, tokens=8, heads=4, kv_heads=2, head_dim=16)
    assert run(query, keys).shape == (2, 1, 4, 16)
    x, stored, run = MAKERS["product"](tokens=2, rows=64, columns=32, stored="int8", by="dot", layout="out_in")
    assert run(x, stored).shape == (2, 32) and stored["values"].dtype == jnp.int8


def test_samples_are_positive_seconds() -> None:
    timed = time_operation("gemm", {"dtype": "bfloat16", "m": 1, "n": 64, "k": 64}, 0, 0.05, None)
    assert len(timed.sides[0]) >= 3 and min(timed.sides[0]) > 0


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(Rejected, match="'fft' are not timed; those that are: gemm"):
        time_operation("fft", {}, 0, 0.05, None)
    sizes = {"tokens": 1, "rows": 64, "columns": 64, "stored": "float32", "by": "cpp", "layout": "in_out"}
    with pytest.raises(Rejected, match="does not do this product"):
        time_operation("product", sizes, 0, 0.05, None)
