"""llama.cpp loads GGUF: float32, bfloat16, Q8_0 and Q4_0 (blocks of 32, which wider groups are made of) and MXFP4. It
rounds inputs by itself; its cache may be in Q8_0 and Q4_0."""

from cosearch.export import ENGINES
from cosearch.export.llama import LlamaEngine

_WEIGHTS = ("float32", "bfloat16", "int8", "int4_g32", "int4_g64", "int4_g128", "mxfp4")
_PAIRS = frozenset((weights, "as_is") for weights in _WEIGHTS)
_CACHES = frozenset({"float32", "bfloat16", "int8", "int4"})


ENGINES.register("llama_cpp")(LlamaEngine(_PAIRS, _CACHES, embeddings=frozenset(_WEIGHTS), block=32))
