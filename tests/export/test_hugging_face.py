"""Which formats and sizes vLLM and SGLang load."""

import pytest

from cosearch.core.candidate import Value
from cosearch.export import STACKS
from cosearch.export.hugging_face import HuggingFace
from tests.export.conftest import Choose

HALF = {"precision.activations": "bfloat16", "precision.kv_cache": "bfloat16"}


@pytest.mark.parametrize(
    ("choices", "why"),
    [
        ({"precision.weights": "bfloat16"}, None),
        ({"precision.kv_cache": "float8_e4m3"}, None),
        (
            {"precision.kv_cache": "bfloat16"},
            "a cache in bfloat16 beside activations in float32 is not loaded, only float8_e4m3",
        ),
        (HALF, None),
        (
            HALF | {"precision.rules": ("layers.0.*.output=int4_g64", "*.down=nvfp4"), "schedule.layers": "unroll"},
            None,
        ),
        (
            {"precision.rules": ("*.down=int8",)},
            "feedforward.down of layer 0: weights in int8 need activations in bfloat16, not float32",
        ),
        (
            HALF | {"precision.rules": ("*.down=int4_g32",), "precision.matmul_inputs": "int8"},
            "feedforward.down of layer 0: weights in int4_g32 by inputs int8 are not loaded, only bfloat16 by as_is, "
            "float32 by as_is, float8_e4m3 by as_is, float8_e4m3 by float8_e4m3, int4_g128 by as_is, int4_g32 by "
            "as_is, int4_g64 by as_is, int8 by as_is, int8 by int8, nvfp4 by as_is",
        ),
        ({"precision.rules": ("embedding=int8",)}, "an embedding in int8 is not loaded, only bfloat16, float32"),
        (
            {"precision.rules": ("layers.2.*.up=bfloat16",), "schedule.layers": "unroll"},
            "feedforward.gate and feedforward.up of layer 2: they are multiplied by as one and must share a format, "
            "not bfloat16 and float32",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_formats(choose: Choose, choices: dict[str, Value], why: str | None):
    assert HuggingFace().why_not(choose(choices)) == why


@pytest.mark.parametrize(
    ("weights", "inputs", "tiled"),
    [
        ("int4_g32", "as_is", True),
        ("int8", "as_is", True),
        ("float8_e4m3", "as_is", True),
        ("int8", "int8", False),
        ("float8_e4m3", "float8_e4m3", False),
        ("nvfp4", "as_is", False),
    ],
)
def test_sglang_takes_some_formats_in_whole_tiles_only(choose: Choose, weights: str, inputs: str, tiled: bool):
    formats: dict[str, Value] = {**HALF, "precision.weights": weights, "precision.matmul_inputs": inputs}
    formats["precision.rules"] = ("embedding=bfloat16",)
    narrow = choose(formats | {"architecture.width": 96})
    assert STACKS["vllm"].why_not(narrow) is None
    assert STACKS["sglang"].why_not(narrow) == (
        "attention.query and attention.key and attention.value of layer 0: "
        f"96 x 288 in {weights} by inputs as_is is not made of whole tiles of 128 x 64 or 64 x 128"
        if tiled
        else None
    )
    # Its keys and its values are 128 x 32 each, and 128 x 192 with the queries.
    assert STACKS["sglang"].why_not(choose(formats | {"architecture.attention": "mqa"})) is None
