"""Honest schedules pass, and whatever computes something else is rejected, whichever way it was planted."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosearch import axes
from cosearch.architecture import cache as kv
from cosearch.architecture import decoder
from cosearch.architecture.attention import softmax
from cosearch.architecture.decoder import pack, plain_decoder
from cosearch.core.candidate import Candidate, Value
from cosearch.core.errors import Rejected
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.measure.bench import Bench
from cosearch.measure.verify import Reference, relative_errors, sharp_weights
from cosearch.precision import FORMATS, Precision

CONTEXT = 32
WORKLOAD = Workload("both", (OperatingPoint("decode", 2, CONTEXT), OperatingPoint("prefill", 2, CONTEXT)))
DECODE = Workload("decode", WORKLOAD.points[:1])
PREFILL = Workload("prefill", WORKLOAD.points[1:])

FORMATS_BY_NAME: Mapping[str, Mapping[str, Value]] = {
    "float32": {},
    "bfloat16": dict.fromkeys(("precision.weights", "precision.kv_cache", "precision.activations"), "bfloat16"),
    "int8": {"precision.weights": "int8", "precision.kv_cache": "int8"},
}
SCHEDULES: Mapping[str, Mapping[str, Value]] = {
    "plain": {},
    "unrolled": {"layers": "unroll", "weight_layout": "out_in", "cache_layout": "bhsd"},
    "multiplied and summed": {"matmul": "multiply_reduce", "attention": "multiply_reduce", "layers": "unroll"},
    "all other": {
        "matmul": "multiply_reduce",
        "weight_layout": "out_in",
        "attention": "multiply_reduce",
        "cache_layout": "bhds",
    },
    "option": {"compiler_options": ("xla_cpu_enable_fast_math=true",), "cache_layout": "bhds"},
}


def candidate(more: Mapping[str, Value] | None = None, **schedule: Value) -> Candidate:
    """Two layers of two heads of 16; `schedule` are its schedule's knobs."""
    return Candidate.from_point(
        {
            "architecture.width": 32,
            "architecture.depth": 2,
            "architecture.head_dim": 16,
            "architecture.ffn_ratio": 2,
            **(more or {}),
            **{f"schedule.{name}": value for name, value in schedule.items()},
        }
    )


@pytest.fixture(scope="module")
def bench() -> Bench:
    """One for all tests, so that references are computed once. Tests that lie to it lie only while it compiles."""
    return Bench()


@pytest.mark.parametrize("format_name", FORMATS_BY_NAME)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_honest_schedules_pass(bench: Bench, format_name: str, schedule: str):
    honest = candidate(FORMATS_BY_NAME[format_name], **SCHEDULES[schedule])
    bench.compile(honest, WORKLOAD)
    decoded, prefilled = bench.verify(honest)
    assert (decoded.positions, prefilled.positions) == (CONTEXT, 6)
    assert 0 < decoded.ratio <= 1


@pytest.mark.parametrize(
    "more",
    [
        {"architecture.attention": "mqa"},
        {"architecture.attention": "gqa", "architecture.width": 64, "architecture.kv_heads": 2},
        {"architecture.attention": "sliding_window", "architecture.window": 8},
        {"architecture.attention": ("sliding_window", "mqa"), "architecture.window": 8, "schedule.layers": "unroll"},
        {"sparsity.pattern": "structured", "sparsity.heads_kept": 0.5, "sparsity.channels_kept": 0.5},
    ],
    ids=str,
)
def test_honest_variants_pass(bench: Bench, more: Mapping[str, Value]):
    honest = candidate(more)
    bench.compile(honest, WORKLOAD)
    assert all(result.ratio <= 1 for result in bench.verify(honest))


# Each of these plants a wrong computation by replacing a part of the model.


def seen(patch: pytest.MonkeyPatch, shift: int, also: Callable[[jax.Array], Any]) -> None:
    """Slots hold what they would hold `shift` tokens later; a query also needs `also(distance)` to see a key."""
    held, visible = softmax.SoftmaxAttention.held, softmax.SoftmaxAttention._visible

    def distance(queries: jax.Array, keys: jax.Array) -> jax.Array:
        return queries[:, None] - keys[None, :]

    patch.setattr(softmax.SoftmaxAttention, "held", lambda self, newest, slots: held(self, newest + shift, slots))
    patch.setattr(
        softmax.SoftmaxAttention,
        "_visible",
        lambda self, queries, keys: visible(self, queries + max(shift, 0), keys) & also(distance(queries, keys)),
    )


def unseen_token(patch: pytest.MonkeyPatch) -> None:
    """The token before is not seen."""
    seen(patch, -1, lambda distance: distance != 1)


def seen_future(patch: pytest.MonkeyPatch) -> None:
    """The mask is off by one: a token sees the next, or an empty slot."""
    seen(patch, 1, lambda distance: distance >= -1)


def dropped_layer(patch: pytest.MonkeyPatch) -> None:
    def layers(self: Any, method: str, x: jax.Array, caches: Any, *positions: jax.Array) -> Any:
        for layer, cache in zip(list(self.layers)[:-1], caches, strict=False):
            x, _, _ = layer.run(method, x, cache, None, *positions)
        return x, caches

    patch.setattr(decoder.Decoder, "_layers", layers)


def products(change: Callable[[jax.Array], jax.Array]) -> Callable[[pytest.MonkeyPatch], None]:
    """A plant: matrices multiply `change(x)` instead of `x`."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        kind = type(FORMATS["float32"])
        honest = kind.matmul
        patch.setattr(kind, "matmul", lambda self, x, *more: honest(self, change(x), *more))

    return plant


def half_precision(patch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16, passed off as float32."""
    products(lambda x: x.astype(jnp.bfloat16).astype(x.dtype))(patch)


def skipped_part_of_k(patch: pytest.MonkeyPatch) -> None:
    """An eighth of every sum is left out."""
    products(lambda x: jnp.where(jnp.arange(x.shape[-1]) < x.shape[-1] * 7 // 8, x, 0))(patch)


def unwritten_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kv.KVCache, "append", lambda self, cache, tensors, slot: cache)
    patch.setattr(softmax.SoftmaxAttention, "_visible", lambda self, queries, keys: queries[:, None] == keys)


def unwritten_values(patch: pytest.MonkeyPatch) -> None:
    """Keys are written to the cache and values are not; a prefill reads another token's values."""
    honest, attend = kv.KVCache.append, softmax.attend
    patch.setattr(
        kv.KVCache,
        "append",
        lambda self, cache, tensors, slot: honest(self, cache, tensors, slot) | {"value": cache["value"]},
    )
    patch.setattr(
        softmax,
        "attend",
        lambda query, key, value, *more: attend(query, key, jnp.roll(value, int(query.shape[1] > 1), axis=1), *more),
    )


def late_write(patch: pytest.MonkeyPatch) -> None:
    """Everything is right until the cache is half full; from there on one slot is overwritten again and again."""
    honest, visible = kv.KVCache.append, softmax.SoftmaxAttention._visible
    half = CONTEXT // 2
    patch.setattr(
        kv.KVCache,
        "append",
        lambda self, cache, tensors, slot: honest(self, cache, tensors, jnp.minimum(slot, half)),
    )
    patch.setattr(
        softmax.SoftmaxAttention,
        "_visible",
        lambda self, queries, keys: visible(self, queries, keys) & ((queries < half)[:, None] | (keys < half)),
    )


def swapped_heads(patch: pytest.MonkeyPatch) -> None:
    honest = softmax.SoftmaxAttention._output
    patch.setattr(softmax.SoftmaxAttention, "_output", lambda self, out: honest(self, out[:, :, ::-1]))


def no_position(patch: pytest.MonkeyPatch) -> None:
    honest = softmax.rotate
    patch.setattr(softmax, "rotate", lambda x, positions: honest(x, 0 * positions))


def shifted_position(patch: pytest.MonkeyPatch) -> None:
    """Only queries: a shift of both changes nothing."""
    honest = softmax.attend
    patch.setattr(
        softmax,
        "attend",
        lambda query, *more: honest(softmax.rotate(query, jnp.ones(query.shape[1], jnp.int32)), *more),
    )


def no_norm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decoder, "rms_norm", lambda x, scale: x * scale.astype(x.dtype))


def unscaled_attention(patch: pytest.MonkeyPatch) -> None:
    honest = softmax.attend
    patch.setattr(softmax, "attend", lambda query, *more: honest(query * 1.1, *more))


PLANTS = (
    unseen_token,
    seen_future,
    dropped_layer,
    skipped_part_of_k,
    unwritten_cache,
    unwritten_values,
    late_write,
    swapped_heads,
    no_position,
    shifted_position,
    no_norm,
    unscaled_attention,
)
FINE_PLANTS = (half_precision,)
"""What formats that are coarse themselves do not show, and need not."""


@pytest.mark.parametrize(
    ("plant", "format_name", "workload"),
    [
        *((plant, "float32", DECODE) for plant in PLANTS + FINE_PLANTS),
        *((plant, "float32", PREFILL) for plant in PLANTS + FINE_PLANTS),
        *(pytest.param(plant, "bfloat16", DECODE, marks=pytest.mark.slow) for plant in PLANTS),
    ],
    ids=lambda value: getattr(value, "__name__", None) or getattr(value, "name", value),
)
def test_a_wrong_computation_is_rejected(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    format_name: str,
    workload: Workload,
):
    depth = 2 if plant is dropped_layer else 1
    wrong = candidate({**FORMATS_BY_NAME[format_name], "architecture.depth": depth}, layers="unroll")
    with monkeypatch.context() as patch:
        plant(patch)
        bench.compile(wrong, workload)
    with pytest.raises(Rejected, match=r"^wrong result: the logits "):
        bench.verify(wrong)


def test_a_prefill_that_does_not_write_its_cache_is_rejected(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """The logits of the prefill itself are right; only what goes on from its cache shows it."""
    wrong = candidate(layers="unroll")
    with monkeypatch.context() as patch:
        patch.setattr(kv.KVCache, "write", lambda self, cache, tensors, slots: cache)
        bench.compile(wrong, PREFILL)
    with pytest.raises(Rejected, match="wrong result"):
        bench.verify(wrong)


def test_a_window_that_is_one_too_long_is_rejected(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    wrong = candidate({"architecture.attention": "sliding_window", "architecture.window": 8}, layers="unroll")
    wider = candidate({"architecture.attention": "sliding_window", "architecture.window": 9}, layers="unroll")
    bench.compile(wider, WORKLOAD)
    with pytest.raises(Rejected, match="wrong result"):
        bench.verify(wrong)


@pytest.mark.parametrize("format_name", FORMATS_BY_NAME)
def test_one_channel_of_the_wrong_scale_is_rejected(bench: Bench, format_name: str):
    wrong = candidate(FORMATS_BY_NAME[format_name])
    (compiled,) = bench.compile(wrong, DECODE)
    part = "scale" if format_name == "int8" else "values"
    index = list(compiled.program.params).index(f"layers.attention.value.{part}")
    factor = np.ones(compiled.params[index].shape[-1])
    factor[5] = 1.5
    compiled.params[index] = (compiled.params[index] * factor).astype(compiled.params[index].dtype)
    with pytest.raises(Rejected, match="wrong result"):
        bench.verify(wrong)


@pytest.fixture(scope="module")
def reference() -> Reference:
    plain = plain_decoder(axes.served_shape(candidate()), Precision())
    tokens = np.random.default_rng(0).integers(0, 256, (2, 16)).astype(np.int32)
    return Reference(plain, pack(plain, sharp_weights(plain.shape, 0)), tokens)


def test_the_exact_logits_pass_with_no_error(reference: Reference):
    result = reference.compare(reference.logits)
    assert (result.positions, result.typical, result.worst, result.ratio) == (16, 0.0, 0.0, 0.0)
    assert 1e-5 < result.typical_allowed <= result.worst_allowed < 1e-4


def altered(reference: Reference, row: Any, position: Any, value: Any) -> np.ndarray:
    logits = reference.logits.astype(np.float32)
    logits[row, position] = value
    return logits


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_rejected(reference: Reference, value: float):
    logits = reference.logits.astype(np.float32)
    logits[1, 7, 200] = value
    with pytest.raises(Rejected, match="the logits at position 7 are not finite"):
        reference.compare(logits)


def test_one_wrong_position_is_rejected_and_named(reference: Reference):
    with pytest.raises(Rejected, match="at position 11;"):
        reference.compare(altered(reference, 1, 11, reference.logits[1, 10]))


def test_of_the_last_positions_a_wrong_one_is_named_by_its_place_in_the_whole(reference: Reference):
    with pytest.raises(Rejected, match="at position 11;"):
        reference.compare(altered(reference, 1, 11, reference.logits[1, 10])[:, -6:])


def test_constant_zero_and_stale_logits_are_rejected(reference: Reference):
    for wrong in (
        np.zeros_like(reference.logits),
        np.full_like(reference.logits, reference.logits.mean()),
        np.broadcast_to(reference.logits[:, :1], reference.logits.shape),
        np.roll(reference.logits, 1, axis=1),
        reference.logits[::-1],
        1.001 * reference.logits,
        reference.logits + 0.001 * np.abs(reference.logits).max(),
    ):
        with pytest.raises(Rejected, match="wrong result"):
            reference.compare(wrong)


def test_logits_of_another_shape_are_rejected(reference: Reference):
    for wrong in (reference.logits[:1], reference.logits[:, :, :128], reference.logits[..., None]):
        with pytest.raises(Rejected, match="wrong result: logits of shape"):
            reference.compare(wrong)


def test_the_last_positions_alone_are_compared_with_the_last(reference: Reference):
    assert reference.compare(reference.logits[:, -1:]).positions == 1
    with pytest.raises(Rejected, match="wrong result"):
        reference.compare(reference.logits[:, :1])


def test_errors_are_relative_to_the_size_of_the_logits():
    exact = np.array([[[3.0, 4.0]]])
    assert relative_errors(exact + np.array([0.0, 0.5]), exact) == pytest.approx(0.1)
    assert relative_errors(1000 * exact + np.array([0.0, 500.0]), 1000 * exact) == pytest.approx(0.1)
