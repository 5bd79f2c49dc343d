"""llama.cpp loads GGUF, here tried in build 11549 (xllamacpp 2026.10.11549): weights in float32, bfloat16, Q8_0, MXFP4
and Q4_0, whose blocks of 32 wider groups are made of, each matrix in its own format; the cache in Q8_0 and Q4_0, too.
Inputs it rounds by itself.

Quantised rows and heads are stored in blocks of 32: "K cache type q8_0 with block size 32 does not divide
n_embd_head_k=16" (`llama_init_from_model`).
"""

from collections.abc import Mapping

from cosearch import axes
from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.core.candidate import Candidate, Value
from cosearch.export import STACKS
from cosearch.export.llama import LLAMA, WHOLE, why_not_llama
from cosearch.precision import Precision

_BLOCK = 32
_WEIGHTS: frozenset[Value] = WHOLE | {"int8", "int4_g32", "int4_g64", "int4_g128", "mxfp4"}


class LlamaCpp:
    loads: Mapping[str, frozenset[Value]] = {
        **LLAMA,
        "precision.weights": _WEIGHTS,
        "precision.matmul_inputs": frozenset({"as_is"}),
        "precision.kv_cache": WHOLE | {"int8", "int4"},
    }

    def why_not(self, candidate: Candidate) -> str | None:
        if why := why_not_llama(candidate, self.loads):
            return why
        shape, precision = axes.served_shape(candidate), Precision.of(candidate.precision)
        for path, (rows, _) in shape.linears().items():
            if (weights := precision.weight_format(path)) not in _WEIGHTS:
                return f"{path}: weights in {weights} are not loaded, only {', '.join(sorted(map(str, _WEIGHTS)))}"
            if weights not in WHOLE and rows % _BLOCK:
                return f"{path}: blocks of {_BLOCK} do not divide {rows} rows"
        attention, cache = shape.layers[0].attention, precision.cache_format(0)
        assert isinstance(attention, SoftmaxShape)
        if cache not in WHOLE and attention.head_dim % _BLOCK:
            return f"a cache in {cache}: blocks of {_BLOCK} do not divide heads of {attention.head_dim}"
        return None


STACKS.register("llama_cpp")(LlamaCpp())
