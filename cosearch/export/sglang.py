"""SGLang loads the same Hugging Face folders as vLLM, without nvfp4 weights beside unrounded inputs."""

from cosearch.export import ENGINES
from cosearch.export.llama import LlamaEngine

_PAIRS = frozenset(
    {
        ("float32", "as_is"),
        ("bfloat16", "as_is"),
        ("int8", "int8"),
        ("float8_e4m3", "as_is"),
        ("float8_e4m3", "float8_e4m3"),
        ("int4_g32", "as_is"),
        ("int4_g64", "as_is"),
        ("int4_g128", "as_is"),
    }
)
_CACHES = frozenset({"float32", "bfloat16", "float8_e4m3"})


ENGINES.register("sglang")(LlamaEngine(_PAIRS, _CACHES, embeddings=frozenset({"float32", "bfloat16"})))
