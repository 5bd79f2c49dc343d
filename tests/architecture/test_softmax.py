"""What softmax attention promises beyond the contract: sinks, borrowed keys, skipped blocks, local and global."""

import numpy as np
import pytest

from cosearch import testing
from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.architecture.decoder import Decoder
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices, Value
from cosearch.core.errors import Rejected
from cosearch.precision import Precision
from cosearch.schedule import Schedule

SMALL: dict[str, Value] = {"width": 64, "depth": 4, "head_dim": 16, "ffn_ratio": 1, "window": 8, "kv_heads": 2}


def shape_of(**choices: Value) -> DecoderShape:
    return DecoderShape.of(Choices({**SMALL, **choices}))


def attention_of(shape: DecoderShape) -> list[SoftmaxShape]:
    found = [layer.attention for layer in shape.layers]
    assert all(isinstance(one, SoftmaxShape) for one in found)
    return [one for one in found if isinstance(one, SoftmaxShape)]


@pytest.mark.parametrize("sinks", [1, 3, 20, 30])  # windows that end beyond the cache, and sinks that fill it
def test_a_window_with_sinks_keeps_the_contract(sinks: int):
    testing.check_attention("sliding_window", {"sinks": sinks})


def test_heads_and_hidden_sizes_differ_by_layer():
    choices: dict[str, Value] = {"heads_ratio": (1, 0.5), "head_dim": (16, 32), "ffn_ratio": (1, 2), "kv_heads": (2, 1)}
    testing.check_attention("gqa", choices)
    assert [(one.heads, one.head_dim, one.kv_heads) for one in attention_of(shape_of(attention="gqa", **choices))] == [
        (4, 16, 2),
        (1, 32, 1),
    ] * 2


def test_sinks_stay_in_the_cache_and_windows_end():
    attention = attention_of(shape_of(attention="sliding_window", sinks=3))[0]
    assert attention.cache(2, 100) == dict.fromkeys(("key", "value"), (2, 11, 2, 16))
    assert attention.cache(2, 9)["key"] == (2, 9, 2, 16)
    assert attention.reads(2, 100) == attention.cache(2, 100)


def test_every_so_many_layers_one_is_global():
    assert [one.window for one in attention_of(shape_of(attention="local_global", locals_per_global=1))] == [
        8,
        None,
    ] * 2
    three = attention_of(shape_of(attention="local_global", locals_per_global=3))
    assert [one.window for one in three] == [8, 8, 8, None]
    with pytest.raises(Rejected, match="4 local layers before each global one leave none of 4 layers global"):
        shape_of(attention="local_global", locals_per_global=4)


def test_a_layer_that_borrows_has_no_keys_of_its_own():
    shape = shape_of(attention=("gqa", "none", "cross_layer", "cross_layer"))
    model = Decoder(shape, Precision(), Schedule("unroll"))
    owner, skipped, *borrowers = model.cache_spec(1, 10)
    assert owner.keys() == {"key", "value"} and skipped == {} and borrowers == [{}, {}]
    paths = shape.linears()
    assert {path for path in paths if path.startswith("layers.2.attention")} == {
        "layers.2.attention.query",
        "layers.2.attention.output",
    }
    assert not any(path.startswith("layers.1.attention") for path in [*paths, *shape.vectors()])


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        (("cross_layer", "mha"), "layer 0: cross_layer attention needs a layer below it"),
        (("gated_delta", "cross_layer"), "layer 1: cross_layer attention needs a layer below it"),
        ("none", "no layer attends"),
    ],
)
def test_what_cannot_attend_is_refused(attention: Value, words: str):
    with pytest.raises(Rejected, match=words):
        shape_of(attention=attention)


def test_queries_to_borrowed_keys_are_a_layers_own():
    lender, borrower = attention_of(
        shape_of(attention=("gqa", "cross_layer"), heads_ratio=(1.0, 0.5), qk_norm=(True, False), depth=2)
    )
    assert (borrower.heads, borrower.kv_heads) == (lender.heads // 2, lender.kv_heads) and not borrower.qk_norm
    assert borrower.reads(3, 10) == lender.reads(3, 10) == lender.cache(3, 10) and borrower.cache(3, 10) == {}
    with pytest.raises(Rejected, match="heads of 8 cannot attend to keys of 16"):
        shape_of(attention=("gqa", "cross_layer"), head_dim=(16, 8), depth=2)


def test_local_and_global_are_counted_among_themselves():
    found = attention_of(shape_of(attention=("mha", "local_global"), window=8, depth=4))
    assert [one.window for one in found] == [None, 8, None, None]


def test_a_list_for_more_layers_than_there_are_is_refused():
    with pytest.raises(Rejected, match="attention is given for 3 layers, and there are 2"):
        shape_of(attention=("mha", "gqa", "mqa"), depth=2)


def test_a_layer_of_nothing_is_refused():
    with pytest.raises(Rejected, match="layer 1 has neither attention nor feed-forward"):
        shape_of(attention=("mha", "none"), feedforward=("swiglu", "none"))


def test_starting_scales_are_those_of_norms():
    vectors = shape_of(attention=("gqa", "cross_layer")).vectors()
    assert np.unique(vectors["layers.0.attention.query_norm"]).tolist() == [2.0]
    assert "layers.1.attention.key_norm" not in vectors
