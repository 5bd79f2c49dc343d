"""What the latency model counts of a candidate, beside what the decoder itself stores."""

import functools
import math
import random
from typing import Any

import jax
import pytest

from cosearch import axes
from cosearch.architecture.decoder import pack, params_spec, random_weights
from cosearch.core.candidate import Candidate, Value
from cosearch.core.space import Space
from cosearch.core.workload import OperatingPoint
from cosearch.latency.features import Work, work
from cosearch.testing import small_space

DECODE = OperatingPoint("decode", 1, 1024)
SMALL: dict[str, Value] = {
    "architecture.width": 64,
    "architecture.depth": 2,
    "architecture.head_dim": 16,
    "schedule.layers": "unroll",
}


@functools.cache
def full_space() -> Space:
    return axes.load_space("llm_decode_full", target="cpu")


@functools.cache
def any_space() -> Space:
    """One that refuses only what no axis can do."""
    return small_space({name: [value] for name, value in SMALL.items()})


def chosen(choices: dict[str, Value]) -> Candidate:
    """The small candidate of these choices, which must be legal."""
    defaults = {name: knob.default for name, knob in axes.declared_knobs().items()}
    point = any_space().canonical({**defaults, **SMALL, **choices})
    assert any_space().why_invalid(point) is None
    return Candidate.from_point(point)


def done(point: OperatingPoint = DECODE, **choices: Value) -> Work:
    """The work of the small candidate of these choices of the architecture."""
    return work(chosen({f"architecture.{name}": value for name, value in choices.items()}), point)


def size(arrays: Any) -> int:
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(arrays))


def vector_bytes(candidate: Candidate) -> int:
    return 4 * sum(vector.size for vector in axes.served_shape(candidate).vectors().values())


@pytest.mark.parametrize("index", range(25))
def test_bytes_of_a_random_candidate_are_those_its_decoder_stores(index: int):
    rng = random.Random(index)
    candidate = full_space().sample(rng)
    batch, context = rng.choice([1, 3, 8]), rng.choice([1, 30, 257, 1024])
    model = axes.decoder(candidate)
    for phase in ("decode", "prefill"):
        counted = work(candidate, OperatingPoint(phase, batch, context))
        stored = size(params_spec(model)) - vector_bytes(candidate)
        assert counted.weight_bytes == pytest.approx(stored, rel=1e-9), candidate.point
        assert counted.cache_bytes == size(model.cache_spec(batch, context)), candidate.point
        most = counted.weight_bytes + counted.cache_bytes * len(model.shape.layers)  # layers may share a cache
        assert 0 < counted.read_bytes <= most * (1 + 1e-9), candidate.point
        assert counted.flops > 0 and counted.products > 0


@pytest.mark.parametrize(
    "choices",
    [
        {"precision.weights": "nvfp4", "precision.rules": ("embedding=int8",)},
        {"precision.weights": "int8", "sparsity.pattern": "n_m"},
        {"precision.weights": "mxfp4", "sparsity.pattern": "block", "sparsity.block": 16},
        {"architecture.feedforward": "moe", "precision.weights": "int4_g32", "sparsity.pattern": "structured"},
    ],
    ids=str,
)
def test_bytes_of_weights_are_those_of_packed_arrays(choices: dict[str, Value]):
    sparse = {"sparsity.channels_kept": 0.5} if choices.get("sparsity.pattern") == "structured" else {}
    candidate = chosen({**choices, **sparse})
    model = axes.decoder(candidate)
    packed = size(pack(model, random_weights(model.shape, 0)))
    assert work(candidate, DECODE).weight_bytes == pytest.approx(packed - vector_bytes(candidate), rel=1e-9)


def test_a_moe_reads_the_chosen_experts_only():
    stored = done(feedforward="moe", experts=8, experts_per_token=2)
    dense = done(feedforward="swiglu")
    assert stored.read_bytes < stored.weight_bytes + stored.cache_bytes
    assert dense.read_bytes == dense.weight_bytes + dense.cache_bytes
    # 8 tokens that choose 2 of 8 experts may read them all.
    many = done(OperatingPoint("decode", 8, 1024), feedforward="moe", experts=8, experts_per_token=2)
    assert many.read_bytes == many.weight_bytes + many.cache_bytes
    # To store more experts costs bytes that are not read, but for the router's.
    more = done(feedforward="moe", experts=16, experts_per_token=2)
    assert more.weight_bytes > 1.5 * stored.weight_bytes
    assert more.read_bytes - stored.read_bytes == pytest.approx(2 * 64 * 8 * 4)


def test_attention_by_blocks_reads_less_cache_than_it_keeps():
    blocks = {"sparsity.attention": "block_topk", "sparsity.attention_block": 16, "sparsity.attention_kept": 4}
    dense, sparse = work(chosen({}), DECODE), work(chosen({**blocks}), DECODE)
    assert sparse.weight_bytes == dense.weight_bytes
    assert sparse.cache_bytes > dense.cache_bytes  # the sums of blocks come on top
    kept = 4 * 64  # bytes of a key or a value of one token
    sums = 1024 // 16 * kept
    assert sparse.read_bytes - sparse.weight_bytes == 2 * (2 * 5 * 16 * kept + sums)
    assert sparse.read_bytes - sparse.weight_bytes < (dense.read_bytes - dense.weight_bytes) / 8


def cache_bytes(context: int, **choices: Value) -> float:
    return done(OperatingPoint("decode", 1, context), **choices).cache_bytes


def test_the_cache_of_a_window_stops_growing():
    window: dict[str, Value] = {"attention": "sliding_window", "window": 32, "sinks": 4, "kv_heads": 1}
    assert cache_bytes(16, **window) < cache_bytes(36, **window)
    assert cache_bytes(36, **window) == cache_bytes(1024, **window) == 2 * 2 * 36 * 16 * 4
    assert cache_bytes(1024, attention="mqa") == 2 * cache_bytes(512, attention="mqa")


def test_the_cache_of_gated_delta_does_not_depend_on_the_context():
    assert cache_bytes(1, attention="gated_delta") == cache_bytes(1024, attention="gated_delta") > 0


def test_queries_multiply_whoever_has_the_keys():
    mha, mqa, shared = (done(attention=variant) for variant in ("mha", "mqa", ("mqa", "cross_layer")))
    heads, head_dim = 4, 16
    key_and_value = 2 * 64 * head_dim  # the matrices of one head
    assert mha.flops - mqa.flops == 2 * 2 * (heads - 1) * key_and_value
    assert mqa.flops - shared.flops == 2 * key_and_value
    # The layer that has no cache reads that of the layer below.
    assert shared.read_bytes - shared.weight_bytes == mqa.read_bytes - mqa.weight_bytes == 2 * shared.cache_bytes
    candidate = chosen({"architecture.attention": "mla", "architecture.latent": 32, "architecture.rope_dim": 8})
    latent, shape = work(candidate, DECODE), axes.served_shape(candidate)
    matrices = 2 * sum(map(math.prod, shape.linears().values()))
    assert latent.flops - matrices == 2 * 2 * heads * (32 + 8 + 32) * 1024


def test_a_prefill_multiplies_what_is_seen():
    prefill = OperatingPoint("prefill", 1, 100)
    window = done(prefill, attention="sliding_window", window=10, kv_heads=1)
    full = done(prefill, attention="mqa").flops - window.flops
    assert full == 2 * 2 * 2 * 64 * (100 * 101 / 2 - (10 * 11 / 2 + 90 * 10))


def test_a_cross_layer_has_no_cache():
    assert cache_bytes(64, attention=("mqa", "cross_layer")) == cache_bytes(64, attention="mqa") / 2
    assert cache_bytes(64, attention=("mqa", "none")) == cache_bytes(64, attention="mqa") / 2
