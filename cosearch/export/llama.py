"""The models that the config files of Llama-like families can tell of, which all stacks load: Llama and, with
normalised queries and keys, Qwen 3. Every layer is the same; formats of weights may differ by layer.
"""

from collections.abc import Mapping

from cosearch import axes
from cosearch.core.candidate import Candidate, Value
from cosearch.precision import Precision

WHOLE = frozenset({"float32", "bfloat16"})
"""The formats that are no quantisation."""

LLAMA: Mapping[str, frozenset[Value]] = {
    "architecture.attention": frozenset({"mha", "gqa", "mqa"}),
    "architecture.feedforward": frozenset({"swiglu"}),
    "sparsity.pattern": frozenset({"dense", "structured"}),
    "sparsity.attention": frozenset({"dense"}),
    "precision.activations": WHOLE,
}


def why_not_llama(candidate: Candidate, loads: Mapping[str, frozenset[Value]]) -> str | None:
    """Why a candidate is no Llama-like model whose knobs stand at values that a stack `loads`; None where it is."""
    for knob, allowed in loads.items():
        value = candidate.point.get(knob)
        if value is not None and not allowed.issuperset(value if isinstance(value, tuple) else (value,)):
            return f"{knob}={value!r} is not loaded, only {', '.join(sorted(map(str, allowed)))}"
    if not axes.served_shape(candidate).uniform:
        return "its layers differ, which a Llama-like config cannot tell"
    caches = Precision.of(candidate.precision).kv_cache
    if isinstance(caches, tuple) and len(set(caches)) > 1:
        return f"the cache is of one format in all layers, not of {', '.join(caches)}"
    return None
