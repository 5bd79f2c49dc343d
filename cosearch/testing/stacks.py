"""The contract of serving stacks: they say what they load in values that there are, and why not the rest."""

from collections.abc import Mapping, Sequence
from typing import Any

from cosearch import axes
from cosearch.export import STACKS
from cosearch.testing.common import NONE, require
from cosearch.testing.proposers import reasons, small_space

_TRIED: Mapping[str, Sequence[Any]] = {
    "architecture.depth": [1, 2],
    "architecture.attention": ["mha", "mqa", "mla"],
    "architecture.feedforward": ["swiglu", "gelu"],
    "precision.weights": ["float32", "bfloat16", "int8"],
    "precision.kv_cache": ["float32", "bfloat16", "int8"],
    "precision.activations": ["float32", "bfloat16"],
    "sparsity.pattern": ["dense", "n_m"],
}


def check_stack(name: str, knobs: Mapping[str, Sequence[Any]] = NONE) -> None:
    """Check the serving stack `name` on Llama-like models and others; `knobs` has other values to try.

    It must load one of them at least, and none with a value that it says it never loads.
    """
    stack, declared = STACKS[name], axes.declared_knobs()
    for knob, values in stack.loads.items():
        require(knob in declared, f"what is loaded is said of knobs that there are, not of {knob!r}")
        for value in values:
            why = declared[knob].refusal(value)
            require(why is None, f"what is loaded of {knob} are values that it can have: {why}")
    for candidate, why in reasons(stack.why_not, small_space({**_TRIED, **knobs})).items():
        for knob, allowed in stack.loads.items():
            value = candidate.point.get(knob)
            parts = value if isinstance(value, tuple) else (value,)
            loaded = value is None or allowed.issuperset(parts)
            require(loaded or why is not None, f"{knob}={value!r}, which is said never to be loaded, is refused")
