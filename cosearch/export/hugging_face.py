"""Hugging Face folders, quantised as compressed-tensors says, which vLLM and SGLang both read on Nvidia GPUs.

As vLLM 0.33.0 and SGLang 0.5.23 have it in `layers/quantization/compressed_tensors`: int8 by channels, int4 by groups
and nvfp4 are multiplied by inputs as they are, int8 and float8 also by inputs that are rounded, token by token. Kernels
for these compute in 16 bits (SGLang's `get_supported_act_dtypes`, vLLM's `cutlass_scaled_mm`). The embedding stays
whole. The cache is of the activations' dtype, which an explicit one "must match" (vLLM's `CacheConfig.cache_dtype`), or
in float8 (https://docs.vllm.ai/en/latest/features/quantization/quantized_kvcache). Queries, keys and values are
multiplied by as one matrix, and gates with what they gate.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cosearch import axes
from cosearch.architecture.decoder import stored_as
from cosearch.architecture.shape import EMBEDDING, DecoderShape
from cosearch.core.candidate import Candidate, Value
from cosearch.export.llama import LLAMA, WHOLE, why_not_llama
from cosearch.precision import Precision

Pair = tuple[str, str]
"""Weights' format, and what the inputs are rounded to."""

PAIRS: frozenset[Pair] = frozenset(
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
_AS_ONE = (
    ("attention.query", "attention.key", "attention.value"),
    ("attention.output",),
    ("feedforward.gate", "feedforward.up"),
    ("feedforward.down",),
)


@dataclass(frozen=True)
class HuggingFace:
    """A stack that reads such folders. `tiles` (in, out) are those of the pairs whose kernels multiply whole ones only:
    one of them must divide what is multiplied by as one."""

    tiles: Mapping[Pair, Sequence[tuple[int, int]]] = field(default_factory=dict)

    @property
    def loads(self) -> Mapping[str, frozenset[Value]]:
        return {
            **LLAMA,
            "precision.weights": frozenset(weights for weights, _ in PAIRS),
            "precision.matmul_inputs": frozenset(inputs for _, inputs in PAIRS),
            "precision.kv_cache": WHOLE | {"float8_e4m3"},
        }

    def why_not(self, candidate: Candidate) -> str | None:
        if why := why_not_llama(candidate, self.loads):
            return why
        shape, precision = axes.served_shape(candidate), Precision.of(candidate.precision)
        for index, names in itertools.product(range(len(shape.layers)), _AS_ONE):
            if why := self._why_not_multiplied(shape, precision, [f"layers.{index}.{name}" for name in names]):
                return f"{' and '.join(names)} of layer {index}: {why}"
        if (embedding := precision.weight_format(EMBEDDING)) not in WHOLE:
            return f"an embedding in {embedding} is not loaded, only {', '.join(sorted(WHOLE))}"
        if (cache := precision.cache_format(0)) not in (precision.activations, "float8_e4m3"):
            return f"a cache in {cache} beside activations in {precision.activations} is not loaded, only float8_e4m3"
        return None

    def _why_not_multiplied(self, shape: DecoderShape, precision: Precision, paths: Sequence[str]) -> str | None:
        """Why the matrices at `paths` cannot be multiplied by as one."""
        formats = {precision.weight_format(path) for path in paths}
        if len(formats) > 1:
            return f"they are multiplied by as one and must share a format, not {' and '.join(sorted(formats))}"
        pair = weights, inputs = formats.pop(), stored_as(shape, precision, paths[0]).inputs
        if pair not in PAIRS:
            known = ", ".join(f"{weights} by {inputs}" for weights, inputs in sorted(PAIRS))
            return f"weights in {weights} by inputs {inputs} are not loaded, only {known}"
        if weights not in WHOLE and precision.activations != "bfloat16":
            return f"weights in {weights} need activations in bfloat16, not {precision.activations}"
        if pair in self.tiles:
            sizes = shape.linears()
            rows, columns = sizes[paths[0]][0], sum(sizes[path][1] for path in paths)
            if all(rows % tile[0] or columns % tile[1] for tile in self.tiles[pair]):
                known = " or ".join(f"{tile[0]} x {tile[1]}" for tile in self.tiles[pair])
                return f"{rows} x {columns} in {weights} by inputs {inputs} is not made of whole tiles of {known}"
        return None
