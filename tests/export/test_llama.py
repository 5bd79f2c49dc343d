"""What all stacks refuse alike."""

import pytest

from cosearch.core.candidate import Value
from cosearch.export.llama import LLAMA, why_not_llama
from tests.export.conftest import Choose

UNROLLED = {"schedule.layers": "unroll"}


@pytest.mark.parametrize(
    "choices",
    [
        {"architecture.attention": "mqa", "architecture.qk_norm": False},
        {"architecture.attention": ("mqa", "gqa"), "architecture.kv_heads": 1},
        {"precision.kv_cache": ("bfloat16", "bfloat16"), "precision.rules": ("layers.0.*=bfloat16",)},
        {"sparsity.pattern": "structured", "sparsity.heads_kept": 0.5},
    ],
    ids=str,
)
def test_llama_like_models_are_not_refused(choose: Choose, choices: dict[str, Value]):
    assert why_not_llama(choose(UNROLLED | choices), LLAMA) is None


@pytest.mark.parametrize(
    ("knob", "value", "why"),
    [
        ("architecture.attention", "mla", "architecture.attention='mla' is not loaded, only gqa, mha, mqa"),
        ("architecture.attention", ("mha", "mqa"), "its layers differ, which a Llama-like config cannot tell"),
        (
            "architecture.attention",
            ("mqa", "cross_layer"),
            "architecture.attention=('mqa', 'cross_layer') is not loaded, only gqa, mha, mqa",
        ),
        ("sparsity.attention", "block_topk", "sparsity.attention='block_topk' is not loaded, only dense"),
        (
            "precision.kv_cache",
            ("bfloat16", "float32"),
            "the cache is of one format in all layers, not of bfloat16, float32",
        ),
    ],
)
def test_other_models_are_refused(choose: Choose, knob: str, value: Value, why: str):
    assert why_not_llama(choose(UNROLLED | {knob: value}), LLAMA) == why
