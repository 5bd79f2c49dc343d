"""The models that the config files of Llama-like families can tell of, which all stacks load: Llama and, with
normalised queries and keys, Qwen 3. Every layer is the same; formats may differ by layer, but not among matrices that a
stack multiplies by as one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cosearch import axes
from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.architecture.decoder import stored_as
from cosearch.architecture.feedforward.swiglu import SwiGLUShape
from cosearch.architecture.shape import EMBEDDING
from cosearch.core.candidate import Candidate, Value
from cosearch.precision import Precision

_LLAMA: Mapping[str, frozenset[Value]] = {
    "architecture.attention": frozenset({"mha", "gqa", "mqa"}),
    "architecture.feedforward": frozenset({"swiglu"}),
    "sparsity.pattern": frozenset({"dense", "structured"}),
    "sparsity.attention": frozenset({"dense"}),
}
_MULTIPLIED_AS_ONE = (
    ("attention", ("query", "key", "value")),
    ("feedforward", ("gate", "up")),
)


def why_not_llama(candidate: Candidate) -> str | None:
    """Why a candidate is no Llama-like model with weights stored whole; None where it is."""
    shape, precision = axes.served_shape(candidate), Precision.of(candidate.precision)
    if not shape.uniform:
        return "its layers differ, which a Llama-like config cannot tell"
    layer = shape.layers[0]
    if not isinstance(layer.attention, SoftmaxShape) or layer.attention.window is not None:
        return f"attention {candidate.architecture['attention']!r} is of no Llama-like family; mha, gqa and mqa are"
    if not isinstance(layer.feedforward, SwiGLUShape):
        return f"feed-forward {candidate.architecture.get('feedforward')!r} is of no Llama-like family; swiglu is"
    if layer.attention.blocks is not None:
        return "no stack skips blocks of keys as 'block_topk' does"
    if shape.compression is not None:
        return f"no stack runs weights of the pattern {candidate.sparsity['pattern']!r}; it would be served dense"
    for block, names in _MULTIPLIED_AS_ONE:
        for index in range(len(shape.layers)):
            formats = {precision.weight_format(f"layers.{index}.{block}.{name}") for name in names}
            if len(formats) > 1:
                return f"{', '.join(names)} are multiplied by as one and must share a format, not {sorted(formats)}"
    if not isinstance(precision.kv_cache, str) and len(set(precision.kv_cache)) > 1:
        return "the cache is of one format in all layers"
    return None


@dataclass(frozen=True)
class LlamaEngine:
    """A stack that loads Llama-like models: `pairs` of weight format and matmul inputs, caches, and formats of the tied
    embedding. Quantised rows are stored in blocks of `block`."""

    pairs: frozenset[tuple[str, str]]
    caches: frozenset[str]
    embeddings: frozenset[str]
    block: int = 1

    @property
    def loads(self) -> Mapping[str, frozenset[Value]]:
        return {
            **_LLAMA,
            "precision.weights": frozenset(weights for weights, _ in self.pairs),
            "precision.matmul_inputs": frozenset(inputs for _, inputs in self.pairs),
            "precision.kv_cache": self.caches,
        }

    def why_not(self, candidate: Candidate) -> str | None:
        return why_not_llama(candidate) or self._why_not_formats(candidate)

    def _why_not_formats(self, candidate: Candidate) -> str | None:
        shape, precision = axes.served_shape(candidate), Precision.of(candidate.precision)
        for path, sizes in shape.linears().items():
            pair = (precision.weight_format(path), stored_as(shape, precision, path).inputs)
            if path == EMBEDDING:
                if pair[0] not in self.embeddings:
                    return f"an embedding in {pair[0]} is not loaded; {', '.join(sorted(self.embeddings))} are"
            elif pair not in self.pairs:
                known = ", ".join(f"{weights} by {inputs}" for weights, inputs in sorted(self.pairs))
                return f"weights in {pair[0]} by inputs {pair[1]} are not among what it loads: {known}"
            if pair[0] not in ("float32", "bfloat16") and sizes[-2] % self.block:
                return f"{path}: blocks of {self.block} do not divide {sizes[-2]} rows"
        if (cache := precision.cache_format(0)) not in self.caches:
            return f"a cache in {cache} is not among what it has: {', '.join(sorted(self.caches))}"
        return None
