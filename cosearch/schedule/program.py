"""A program: what of a decoder is compiled for one operating point, with flat inputs and outputs.

Inputs are the parameters by sorted path, then the cache's arrays in tree order, then the tokens and positions;
outputs are the logits and the cache. The cache is donated: a step writes it in place. Being flat, a program needs
no tree structure of this code to be loaded and run elsewhere.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from cosearch.architecture.decoder import Decoder, bind, params_spec
from cosearch.core.errors import Rejected
from cosearch.core.workload import Phase
from cosearch.kernels.cpu.program import kernels_in


@dataclass(frozen=True)
class Program:
    """`phase` of `model` for `batch` sequences and a cache of `capacity` tokens each; a prefill takes `chunk` tokens.

    decode:  tokens [batch], position []                -> logits [batch, 256]
    prefill: tokens [batch, chunk], start [], length [] -> logits [batch, 256]
    """

    model: Decoder
    phase: Phase
    batch: int
    capacity: int
    chunk: int = 1

    @cached_property
    def params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Every parameter, sorted by path."""
        return dict(sorted(params_spec(self.model).items()))

    @cached_property
    def cache(self) -> list[jax.ShapeDtypeStruct]:
        """The cache's arrays."""
        return jax.tree.leaves(self.model.cache_spec(self.batch, self.capacity))

    @property
    def inputs(self) -> list[jax.ShapeDtypeStruct]:
        """Tokens and positions."""
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        if self.phase == "decode":
            return [jax.ShapeDtypeStruct((self.batch,), jnp.int32), scalar]
        return [jax.ShapeDtypeStruct((self.batch, self.chunk), jnp.int32), scalar, scalar]

    def __call__(self, *arguments: Any) -> tuple[jax.Array, ...]:
        names, count = list(self.params), len(self.cache)
        params = dict(zip(names, arguments[: len(names)], strict=True))
        structure = jax.tree.structure(self.model.cache_spec(self.batch, self.capacity))
        cache = jax.tree.unflatten(structure, arguments[len(names) : len(names) + count])
        model = bind(self.model, params)
        run = model.decode_step if self.phase == "decode" else model.prefill
        logits, cache = run(cache, *arguments[len(names) + count :])
        return logits, *jax.tree.leaves(cache)

    def jitted(self) -> Any:
        """The jitted program, with its cache donated."""
        first = len(self.params)
        return jax.jit(self.__call__, donate_argnums=tuple(range(first, first + len(self.cache))), keep_unused=True)

    def arguments(self) -> list[jax.ShapeDtypeStruct]:
        """The shapes of all inputs."""
        return [*self.params.values(), *self.cache, *self.inputs]

    def kernels(self) -> list[str]:
        """The C++ kernels that it calls (`cosearch.kernels.cpu.program.load`)."""
        return kernels_in(self.jitted().lower(*self.arguments()).as_text())

    def compile(self, options: dict[str, Any]) -> jax.stages.Compiled:
        """Compile for the default device.

        Raises:
            Rejected: the compiler refuses the program or an option.
        """
        try:
            return self.jitted().lower(*self.arguments()).compile(compiler_options=options or None)
        except jax.errors.JaxRuntimeError as error:
            raise Rejected(f"does not compile: {str(error).splitlines()[0][:500]}") from None
