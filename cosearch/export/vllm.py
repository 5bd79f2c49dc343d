"""vLLM loads Hugging Face folders, quantised as compressed-tensors says: int8 and float8 with and without rounded
inputs, int4 by groups, nvfp4; the
embedding is not quantised. Its cache is in the activations' dtype or in float8."""

from cosearch.export import ENGINES
from cosearch.export.llama import LlamaEngine

_PAIRS = frozenset(
    {
        ("float32", "as_is"),
        ("bfloat16", "as_is"),
        ("int8", "as_is"),
        ("int8", "int8"),
        ("float8_e4m3", "as_is"),
        ("float8_e4m3", "float8_e4m3"),
        ("int4_g32", "as_is"),
        ("int4_g64", "as_is"),
        ("int4_g128", "as_is"),
        ("nvfp4", "as_is"),
    }
)
_CACHES = frozenset({"float32", "bfloat16", "float8_e4m3"})


ENGINES.register("vllm")(LlamaEngine(_PAIRS, _CACHES, embeddings=frozenset({"float32", "bfloat16"})))
