"""Which formats and sizes llama.cpp loads."""

import pytest

from cosearch.core.candidate import Value
from cosearch.export.llama_cpp import LlamaCpp
from tests.export.conftest import Choose

NARROW = {"architecture.width": 48, "architecture.head_dim": 16}


@pytest.mark.parametrize(
    ("choices", "why"),
    [
        ({"precision.weights": "int8", "precision.kv_cache": "int4", "precision.activations": "bfloat16"}, None),
        ({"precision.weights": "mxfp4", "precision.rules": ("*.value=int4_g128", "*.up=float32")}, None),
        (
            {"precision.rules": ("*.down=nvfp4",)},
            "layers.0.feedforward.down: weights in nvfp4 are not loaded, only bfloat16, float32, int4_g128, int4_g32, "
            "int4_g64, int8, mxfp4",
        ),
        (NARROW | {"precision.kv_cache": "bfloat16"}, None),
        (NARROW | {"precision.weights": "int8"}, "layers.0.attention.query: blocks of 32 do not divide 48 rows"),
        (NARROW | {"precision.kv_cache": "int8"}, "a cache in int8: blocks of 32 do not divide heads of 16"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_formats(choose: Choose, choices: dict[str, Value], why: str | None):
    assert LlamaCpp().why_not(choose(choices)) == why
