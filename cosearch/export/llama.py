"""The models that the config files of Llama-like families can tell of, which all stacks load: Llama and, with
normalised queries and keys, Qwen 3. Every layer is the same; formats may differ by layer, but not among matrices that a
stack multiplies by as one.
"""

from cosearch import axes
from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.architecture.feedforward.swiglu import SwiGLUShape
from cosearch.core.candidate import Candidate
from cosearch.precision import Precision

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


def why_not_formats(candidate: Candidate, pairs: frozenset[tuple[str, str]], caches: frozenset[str]) -> str | None:
    """Why formats are not among a stack's `pairs` of weights and inputs, and `caches`; None where they are."""
    shape, precision = axes.served_shape(candidate), Precision.of(candidate.precision)
    for path in shape.linears():
        pair = (precision.weight_format(path), precision.matmul_inputs)
        if pair not in pairs:
            known = ", ".join(f"{weights} by {inputs}" for weights, inputs in sorted(pairs))
            return f"weights in {pair[0]} by inputs {pair[1]} are not among what it loads: {known}"
    if (cache := precision.cache_format(0)) not in caches:
        return f"a cache in {cache} is not among what it has: {', '.join(sorted(caches))}"
    return None
