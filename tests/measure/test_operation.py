from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosearch.core.errors import Rejected
from cosearch.latency.hlo import Module
from cosearch.measure.operation import MAKERS, in_turn, linked, links, time_operation
from cosearch.targets.accelerator import accelerator

COPIES = 4


def launches(function: Callable[..., Any], *arguments: Any, chip: str | None = None) -> float:
    """How many kernels one run starts, on a chip or here."""
    specs = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), arguments)
    compiled = accelerator(chip).compile(function, specs) if chip else jax.jit(function).lower(*specs).compile()
    return sum(kernel.runs for kernel in Module(compiled.as_text() or "").kernels())


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


def test_a_refusal_without_words_is_told_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NotImplementedError

    monkeypatch.setitem(MAKERS, "odd", refuse)  # pyright: ignore[reportArgumentType]
    with pytest.raises(Rejected, match=r"^odd \{\}: NotImplementedError$"):
        time_operation("odd", {}, 0, 0.05, None)


@pytest.mark.parametrize("by", ["dot", "multiply_reduce"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_on_a_processor_linked_operations_are_the_operations_and_the_links(stored: str, by: str) -> None:
    sizes = {"tokens": 4, "rows": 512, "columns": 1024, "stored": stored, "by": by, "layout": "in_out"}
    x, operand, run = MAKERS["product"](**sizes)
    whole = launches(linked(run), x, [operand] * COPIES)
    beside = launches(links, x, [jax.eval_shape(run, x, operand)] * COPIES)
    assert whole - beside == COPIES * launches(run, x, operand)


def test_an_operation_that_waits_for_the_last_one_reads_what_that_wrote() -> None:
    x, operand, run = MAKERS["product"](tokens=1, rows=64, columns=64, stored="float32", by="dot", layout="in_out")
    last, (first, second) = jax.jit(linked(run))(x, [operand] * 2)
    np.testing.assert_allclose(first, run(x, operand), rtol=1e-5)
    np.testing.assert_allclose(second, run(x.at[0, 0].set(first[0, 0]), operand), rtol=1e-4, atol=1e-4)
    assert last[0, 0] == second[0, 0]


GEMM, ATTENTION = {"n": 2048, "k": 4096}, {"heads": 16, "kv_heads": 4, "head_dim": 128}


@pytest.mark.chips
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        *(("gemm", {"dtype": dtype, "m": m, **GEMM}) for dtype in ("bfloat16", "fp8") for m in (1, 16, 2048)),
        ("attn_context", {"batch": 1, "tokens": 256, **ATTENTION}),
        ("attn_generation", {"batch": 8, "tokens": 1024, **ATTENTION}),
        ("product", {"tokens": 4, "rows": 512, "columns": 1024, "stored": "int8", "by": "dot", "layout": "in_out"}),
    ],
)
def test_on_a_gpu_operations_in_turn_are_the_operations_and_nothing_else(kind: str, sizes: dict[str, Any]) -> None:
    x, operand, run = MAKERS[kind](**sizes)
    together = launches(in_turn(run), [x] * COPIES, [operand] * COPIES, chip="h100")
    assert together == COPIES * launches(run, x, operand, chip="h100") > 0
