"""Attention to the blocks of keys that score best: the same in scoring, prefill and steps, and nothing else is read."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosearch import axes
from cosearch.architecture import cache as kv
from cosearch.architecture.attention.softmax import BlockTopK, SoftmaxShape
from cosearch.architecture.decoder import Decoder, bind, pack
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Candidate, Choices
from cosearch.core.errors import Rejected
from cosearch.measure.verify import sharp_weights
from cosearch.precision import Precision
from cosearch.schedule import Schedule
from cosearch.sparsity import served_shape
from cosearch.testing.architecture import CASES, Case, check_decoding

CAPACITY = 24


def dense(**choices: object) -> DecoderShape:
    return DecoderShape.of(Choices({"width": 64, "depth": 2, "head_dim": 16, "ffn_ratio": 1, **choices}))


def sparse(size: int, kept: int, **choices: object) -> DecoderShape:
    chosen = {"attention": "block_topk", "attention_block": size, "attention_kept": kept}
    return served_shape(dense(**choices), Choices(chosen))


def score(shape: DecoderShape, tokens: np.ndarray) -> np.ndarray:
    model = Decoder(shape, schedule=Schedule("unroll"))
    params = pack(model, sharp_weights(shape, 0))
    return np.asarray(jax.jit(lambda p, t: bind(model, p).score(t))(params, tokens))


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.dtype}-{case.schedule.cache_layout}")
def test_scoring_prefill_and_steps_agree(case: Case, size: int):
    check_decoding(sparse(size, 2, attention="gqa", kv_heads=2), case)


def test_enough_blocks_are_full_attention():
    tokens = np.random.default_rng(0).integers(0, 256, (2, CAPACITY), dtype=np.int32)
    np.testing.assert_allclose(score(sparse(4, 6), tokens), score(dense(), tokens), rtol=1e-4, atol=1e-4)
    assert np.abs(score(sparse(4, 1), tokens) - score(dense(), tokens)).max() > 1e-2


def test_a_step_reads_the_chosen_blocks_only():
    shape = sparse(4, 2, depth=1)
    model = Decoder(shape, Precision(), Schedule("unroll"))
    params = {path: jnp.asarray(array) for path, array in pack(model, sharp_weights(shape, 0)).items()}
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 256, (1, CAPACITY), dtype=np.int32))
    cache = kv.zeros(model.cache_spec(1, CAPACITY))
    _, (layer,) = bind(model, params).prefill(cache, tokens[:, :-1], jnp.int32(0), jnp.int32(CAPACITY - 1))
    at = jnp.int32(CAPACITY - 1)
    logits, _ = bind(model, params).decode_step([layer], tokens[:, -1], at)
    finite = 0
    for block in range(5):  # the sixth is the query's own
        spoilt = layer | {
            name: {"values": layer[name]["values"].at[:, 4 * block : 4 * block + 4].set(jnp.nan)}
            for name in ("key", "value")
        }
        after, _ = bind(model, params).decode_step([spoilt], tokens[:, -1], at)
        same = bool(jnp.isfinite(after).all())
        assert not same or bool((after == logits).all())
        finite += same
    # Every head chooses two blocks of its own; some block is chosen by no head, or all were read.
    assert finite > 0


def test_it_counts_as_read_what_is_read():
    attention = sparse(4, 2).layers[0].attention
    assert isinstance(attention, SoftmaxShape)
    assert attention.reads(2, 1000)["key"] == (2, 12, 4, 16) and attention.reads(2, 8)["value"] == (2, 8, 4, 16)
    assert attention.states(2, 22) == {"key_sum": (2, 6, 4, 16)}


def test_windows_stay_as_they_are():
    shape = sparse(4, 2, attention=("sliding_window", "mha"), window=8)
    first, second = (layer.attention for layer in shape.layers)
    assert isinstance(first, SoftmaxShape) and first.blocks is None
    assert isinstance(second, SoftmaxShape) and second.blocks == BlockTopK(4, 2)


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        ("sliding_window", "needs a layer with softmax attention to all tokens"),
        (("mha", "cross_layer"), "cross_layer attention shares all of them"),
    ],
)
def test_it_says_where_it_cannot_be(attention: object, words: str):
    with pytest.raises(Rejected, match=words):
        sparse(4, 2, attention=attention)


def test_a_candidate_that_chooses_it_is_served_so():
    point = {"architecture.depth": 1, "sparsity.attention": "block_topk", "sparsity.attention_kept": 3}
    attention = axes.served_shape(Candidate.from_point(point)).layers[0].attention
    assert isinstance(attention, SoftmaxShape) and attention.blocks == BlockTopK(16, 3)
    assert axes.dense_shape(Candidate.from_point(point)).layers[0].attention == replace(attention, blocks=None)
