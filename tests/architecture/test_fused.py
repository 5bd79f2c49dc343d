"""Layers that run as one call: as right as layers that do not, and refused in words where they cannot."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosearch import sparsity
from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.architecture.cache import zeros
from cosearch.architecture.decoder import (
    Decoder,
    bind,
    native_products,
    pack,
    plain_decoder,
    why_no_kernel,
    why_not_fused,
)
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices
from cosearch.core.workload import OperatingPoint
from cosearch.measure.bench import Compiled
from cosearch.measure.verify import Reference, sharp_weights
from cosearch.precision import FORMATS, Precision
from cosearch.schedule import Schedule
from cosearch.schedule.program import Program

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.usefixtures("quick_kernels"),
]

NATIVE = Schedule(layers="unroll", matmul="cpp")
LAYER, STEP = replace(NATIVE, fusion="layer"), replace(NATIVE, fusion="step")
BASE = {"width": 64, "depth": 2, "head_dim": 32, "ffn_ratio": 2}
BFLOAT16 = Precision(weights="bfloat16", activations="bfloat16", kv_cache="bfloat16")
TOKENS, CHUNK = 29, 12
"""No whole number of chunks."""


def shape_of(**choices: Any) -> DecoderShape:
    return DecoderShape.of(Choices({**BASE, **choices}))


def verify(
    shape: DecoderShape, precision: Precision, schedule: Schedule, batch: int, count: int = TOKENS, chunk: int = CHUNK
) -> None:
    """Decode programs and prefills in chunks are as near float64 as their formats allow; caches are written in place by
    what is wholly fused.

    Raises:
        Rejected: they are not.
    """
    plain, weights = plain_decoder(shape, precision), sharp_weights(shape, 0)
    tokens = np.random.default_rng(0).integers(0, 256, (batch, count)).astype(np.int32)
    reference = Reference(plain, pack(plain, weights), tokens)
    model = Decoder(shape, precision, schedule)
    fused = all(isinstance(one.attention, SoftmaxShape | None) for one in shape.layers)
    fused &= not any(why_not_fused(shape, precision, schedule))
    packed = pack(model, weights)
    decode = Program(model, "decode", batch, count)
    params = [jax.device_put(packed[path]) for path in decode.params]
    step = Compiled(OperatingPoint("decode", batch, count), decode, decode.compile({}), params)
    prefill = replace(decode, phase="prefill", chunk=chunk)
    chunks = Compiled(OperatingPoint("prefill", batch, count), prefill, prefill.compile({}), params, step.executable)
    for compiled in (step, chunks):
        reference.compare(compiled.logits(tokens, 3))
        if fused and schedule.layers == "unroll":
            assert compiled.copied_bytes == 0


CASES = [
    ({"attention": "mha"}, Precision(), LAYER, 1),
    ({"attention": "mha", "width": 96, "head_dim": 24}, BFLOAT16, replace(STEP, cache_layout="bhsd"), 3),
    (
        {"attention": "gqa", "width": 128, "kv_heads": 2, "feedforward": "gelu"},
        Precision(weights="int8", matmul_inputs="int8", kv_cache="int8"),
        replace(STEP, cache_layout="bhds"),
        3,
    ),
    ({"attention": "mqa", "qk_norm": False}, Precision(weights="int4_g32", kv_cache="int4"), LAYER, 1),
    (
        {"attention": "sliding_window", "window": 9, "sinks": 2},
        Precision(weights="nvfp4", kv_cache="float8_e4m3"),
        replace(STEP, cache_layout="bhsd"),
        3,
    ),
    ({"attention": "sliding_window", "window": 5}, Precision(kv_cache="int8"), replace(LAYER, layers="scan"), 1),
    ({"attention": "local_global", "window": 7, "depth": 4}, Precision(weights="mxfp4"), STEP, 1),
    (
        {"attention": ("mqa", "cross_layer"), "depth": 4},
        Precision(weights="float8_e4m3", activations="bfloat16", kv_cache="int4"),
        replace(STEP, cache_layout="bhds"),
        1,
    ),
    ({"attention": ("mqa", "cross_layer")}, Precision(), LAYER, 1),
    ({"attention": ("mqa", "none", "cross_layer"), "depth": 3}, Precision(), LAYER, 1),
    ({"attention": "mha"}, BFLOAT16, replace(LAYER, layers="scan", cache_layout="bhds"), 1),
    ({"attention": ("mha", "none"), "feedforward": ("none", "gelu")}, Precision(), STEP, 1),
    ({"attention": ("mqa", "gated_delta")}, Precision(weights="int8"), STEP, 1),
    ({"attention": "gated_delta", "width": 144, "head_dim": 72, "depth": 1}, Precision(), STEP, 3),
    ({"attention": ("mha", "mla"), "latent": 32}, Precision(), LAYER, 1),
    ({"attention": "mha", "feedforward": ("moe", "swiglu")}, Precision(), LAYER, 1),
]


@pytest.mark.parametrize(("choices", "precision", "schedule", "batch"), CASES, ids=str)
def test_fused_layers_are_as_right_as_their_formats(
    choices: dict[str, Any], precision: Precision, schedule: Schedule, batch: int
):
    shape = shape_of(**choices)
    assert None in why_not_fused(shape, precision, schedule) or "cross_layer" in choices["attention"]
    verify(shape, precision, schedule, batch)


@pytest.mark.parametrize(
    ("choices", "precision", "layout"),
    [
        ({"attention": "gqa", "kv_heads": 1}, Precision(kv_cache="int8"), "bhsd"),
        ({"attention": "sliding_window", "window": 90, "sinks": 3}, Precision(), "bshd"),
        ({"attention": "sliding_window", "window": 40}, Precision(kv_cache="bfloat16"), "bhds"),
    ],
)
def test_long_chunks_go_block_by_block(choices: dict[str, Any], precision: Precision, layout: str):
    """More queries than one block of `native/prefill.cc` has, and more keys, before and in the chunk."""
    shape = shape_of(**choices, depth=1)
    verify(shape, precision, replace(STEP, cache_layout=layout), 2, count=230, chunk=97)


@pytest.mark.parametrize(
    ("form", "layout"),
    [("float32", "bhds"), ("bfloat16", "bhsd"), ("int8", "bshd"), ("float8_e4m3", "bhds"), ("int4", "bhsd")],
)
def test_fused_layers_leave_the_same_cache(form: str, layout: str):
    """After a prefill and a step, but for what another order of sums makes of a value: at most one code."""
    shape, precision = shape_of(attention="mqa", depth=1), Precision(kv_cache=form)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 9)), jnp.int32)
    found = []
    for schedule in (replace(NATIVE, cache_layout=layout), replace(STEP, cache_layout=layout)):
        model = Decoder(shape, precision, schedule)
        params = {path: jnp.asarray(one) for path, one in pack(model, sharp_weights(shape, 0)).items()}

        @jax.jit
        def run(params: Any, tokens: jax.Array, model: Decoder = model) -> Any:
            start, length = jnp.int32(0), jnp.int32(7)
            _, cache = bind(model, params).prefill(zeros(model.cache_spec(2, 12)), tokens[:, :8], start, length)
            return bind(model, params).decode_step(cache, tokens[:, 8], length)[1]

        (cache,) = run(params, tokens)
        held = model.kv_cache(0)
        found.append({name: np.asarray(held.load(cache, name), np.float64) for name in cache})
    for name, plain in found[0].items():
        other = found[1][name]
        assert plain[:, :8].any() and not plain[:, 8:].any() and not other[:, 8:].any()
        step = 2.1 * FORMATS[form].cache_bound(plain) if form != "float32" else 0
        assert (np.abs(plain - other) <= step + 1e-5).all(), name
        assert np.mean(plain != other) < (1 if form == "float32" else 0.05)


def refusal(precision: Precision = Precision(), schedule: Schedule = LAYER, **choices: Any) -> list[str | None]:
    return list(why_not_fused(shape_of(**choices), precision, schedule))


def test_layers_say_why_they_are_not_run_as_one_call():
    assert refusal(attention="mha") == [None, None]
    assert refusal(attention="mha", schedule=NATIVE) == ["it is not asked for"] * 2
    (why, _) = refusal(attention="mha", schedule=replace(LAYER, matmul="dot"))
    assert why is not None and "only products by the kernel 'cpp'" in why
    for whys, words in (
        (refusal(attention="mla", latent=32), "its attention is no softmax attention"),
        (refusal(attention="mha", feedforward="moe"), "its feedforward is no softmax attention"),
    ):
        assert all(why is not None and words in why for why in whys), whys
    assert refusal(attention=("mqa", "cross_layer")) == ["it shares keys with another layer"] * 2
    assert refusal(attention=("mqa", "cross_layer"), schedule=STEP) == [None, None]
    mixed = Precision(weights="int8", rules=("layers.0.attention.key=float32",))
    assert refusal(mixed, attention="mha") == ["query, key, value are not stored alike", None]
    assert refusal(Precision(weights="int8", rules=("layers.1.attention.*=bfloat16",)), attention="mha") == [None, None]
    rounded = Precision(weights="float8_e4m3", matmul_inputs="float8_e4m3")
    (why, _) = refusal(rounded, attention="mha")
    assert why == "attention.query: it rounds no inputs to float8_e4m3"
    (why, _) = refusal(Precision(kv_cache="int4"), attention="mha", head_dim=16)
    assert why == "it reads 4 bits 32 at a time, and a head has 16"


def sparse(choices: dict[str, Any]) -> DecoderShape:
    return sparsity.served_shape(shape_of(attention="mha"), Choices(choices))


def test_sparse_layers_say_why_they_are_not_run_as_one_call():
    (why, _) = why_not_fused(sparse({"attention": "block_topk"}), Precision(), LAYER)
    assert why == "it attends to blocks of keys"
    blocks = sparse({"pattern": "block", "blocks_kept": 0.5})
    (why, _) = why_not_fused(blocks, Precision(), LAYER)
    assert why is not None and "it knows compressed weights by N:M alone" in why


def test_a_schedule_whose_kernels_would_do_nothing_is_refused():
    attention = Schedule(attention="cpp")
    for shape, precision, schedule, words in (
        (shape_of(attention="gated_delta"), Precision(), attention, "no layer has softmax attention over all"),
        (shape_of(attention="mla", latent=32), Precision(), attention, "no layer has softmax attention over all"),
        (sparse({"attention": "block_topk"}), Precision(), attention, "no layer has softmax attention over all"),
        (shape_of(attention="mha", head_dim=16), Precision(kv_cache="int4"), attention, "reads 4 bits 32 at a time"),
        (shape_of(attention="mla", latent=32), Precision(), LAYER, "layer 0 is not run as one call: its attention"),
        (shape_of(attention=("mha", "mla"), latent=32), Precision(), STEP, "layer 1 is not run as one call"),
        (shape_of(attention=("mha", "mla"), latent=32), Precision(), LAYER, None),
        (shape_of(attention="mha"), Precision(), replace(STEP, layers="scan"), "take layers='unroll'"),
        (shape_of(attention="mha"), Precision(), STEP, None),
    ):
        why = why_no_kernel(shape, precision, schedule)
        assert why == words if words is None else why is not None and words in why, (words, why)


def test_products_that_run_as_one_are_tuned_as_one():
    shape, point = shape_of(attention="gqa", width=128, kv_heads=2, depth=1), OperatingPoint("decode", 3, 32)
    alone = {(one.rows, one.columns) for one in native_products(shape, Precision(), NATIVE, point)}
    assert alone == {(128, 128), (128, 64), (128, 256), (256, 128)}
    together = [(one.rows, one.columns) for one in native_products(shape, Precision(), LAYER, point)]
    assert together == [(128, 256), (128, 256), (128, 128), (128, 512), (256, 128)], "the first gives the logits"
    assert {one.tokens for one in native_products(shape, Precision(), LAYER, point)} == {3}
    assert native_products(shape, Precision(), replace(NATIVE, matmul="dot"), point) == []


def test_what_a_prefill_runs_by_itself_is_tuned_by_itself():
    """The gated delta rule is one call in a step alone; a prefill gives the logits after its last token."""
    shape = shape_of(attention="gated_delta", depth=1)
    logits, *decode = native_products(shape, Precision(), STEP, OperatingPoint("decode", 2, 32))
    assert (logits.tokens, len(decode)) == (2, 5)
    logits, *prefill = native_products(shape, Precision(), STEP, OperatingPoint("prefill", 2, 32))
    assert (logits.tokens, {one.tokens for one in prefill}) == (2, {64})
    attention = shape.layers[0].attention
    assert attention is not None and len(prefill) == len(attention.linears(64)) + 3


def test_nan_is_not_hidden():
    """Among the weights of keys it is in every logit."""
    shape = shape_of(attention="mha", depth=1)
    model = Decoder(shape, Precision(weights="int8", kv_cache="int8"), STEP)
    params = pack(model, sharp_weights(shape, 0))
    params["layers.0.attention.key.scale"][...] = np.nan
    arrays = {path: jnp.asarray(one) for path, one in params.items()}
    cache, token = zeros(model.cache_spec(1, 8)), jnp.ones(1, jnp.int32)
    logits, _ = jax.jit(lambda arrays: bind(model, arrays).decode_step(cache, token, jnp.int32(0)))(arrays)
    assert np.isnan(np.asarray(logits)).all()
