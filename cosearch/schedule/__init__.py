"""Axis *schedule*: how the same mathematics is run. It changes latency and memory, never the model's quality.

`matmul.py` holds the lowerings of the matrix product; the layouts of the KV cache are in
`architecture/cache.py`. To add a knob, declare it in `KNOBS`, give it a field in `Schedule`, and read it where the
mathematics is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cosearch.core.candidate import Choices, Value
from cosearch.core.space import Knob, choice, integer
from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS
from cosearch.schedule import matmul

CACHE_LAYOUTS = ("bshd", "bhsd", "bhds")
"""Memory order of the KV cache: batch, slot, head, dimension."""

FUSIONS = ("none", "layer", "step")
"""A call for each product and attention, for each layer that can be run as one, or for all layers together."""

BOUNDARIES = ("default", "compiler")
"""Who chooses in which layouts weights and caches lie in memory when a program is called (`jax.experimental.layout`):
each axis within the one before, or whatever the compiler would copy them to. Compilers for CPUs and GPUs take the
default; that for TPUs, of a decoder's 54 arrays, chose others for 21, and 8 copies were left of 30."""

FUSE_LIMITS = ("none", "products")
"""Where the compiler for TPUs must not fuse: nowhere, or across the results of matrix products
(`jax.experimental.xla_metadata`). Other compilers do not know the limit."""


def _why_no_option(value: Value) -> str | None:
    if not isinstance(value, tuple):
        return f"{value!r} is not a list of compiler options"
    for option in value:
        if not isinstance(option, str) or "=" not in option:
            return f"{option!r} must read 'name=value', for example 'xla_cpu_enable_fast_math=true'"
    return None


KNOBS: Mapping[str, Knob] = {
    "layers": choice("scan", lambda: ("scan", "unroll")),
    "matmul": choice("dot", lambda: (*matmul.MATMULS, *MATMUL_KERNELS.names())),
    "weight_layout": choice("in_out", lambda: matmul.LAYOUTS),
    "attention": choice("dot", lambda: (*matmul.MATMULS, *ATTENTION_KERNELS.names())),
    "cache_layout": choice("bshd", lambda: CACHE_LAYOUTS),
    "fusion": choice("none", lambda: FUSIONS),
    "steps": integer(1),
    "boundary": choice("default", lambda: BOUNDARIES),
    "fuse_limit": choice("none", lambda: FUSE_LIMITS),
    "compiler_options": Knob((), _why_no_option),
}


@dataclass(frozen=True)
class Schedule:
    """`layers`: one loop over stacked layers, or each on its own. `matmul` and `attention`: what runs the matrix
    products and decode attention, a lowering of XLA's (`matmul.py`) or a kernel (`cosearch/kernels`), in whose place
    the lowering "dot" does what it cannot. `weight_layout`: the memory order of matrices where no kernel has its own.
    `fusion`: how much one call of C++ kernels runs. `steps`: tokens that one call of the decode program adds to each
    sequence. `boundary`, `fuse_limit`: what the compiler for TPUs may choose. `compiler_options`: 'name=value' for
    XLA."""

    layers: str = "scan"
    matmul: str = "dot"
    weight_layout: str = "in_out"
    attention: str = "dot"
    cache_layout: str = "bshd"
    fusion: str = "none"
    steps: int = 1
    boundary: str = "default"
    fuse_limit: str = "none"
    compiler_options: tuple[str, ...] = ()

    @classmethod
    def of(cls, choices: Choices) -> "Schedule":
        return cls(**{name: choices.get(name, knob.default) for name, knob in KNOBS.items()})  # pyright: ignore[reportArgumentType]

    @property
    def layout(self) -> str:
        """The memory order of matrices: the one that a kernel of products is made for, or `weight_layout`."""
        return MATMUL_KERNELS[self.matmul].layout if self.matmul in MATMUL_KERNELS else self.weight_layout

    @property
    def portable(self) -> "Schedule":
        """The same layouts without kernels, which are made for one kind of chip."""
        kept = {"matmul": self.matmul, "attention": self.attention}
        plain = {name: value if value in matmul.MATMULS else "dot" for name, value in kept.items()}
        return replace(self, **plain, weight_layout=self.layout, fusion="none", boundary="default")

    @property
    def options(self) -> dict[str, Any]:
        """The compiler options as XLA takes them."""
        return {name: _typed(text) for name, _, text in (option.partition("=") for option in self.compiler_options)}


def _typed(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.lstrip("-").isdigit() else text
