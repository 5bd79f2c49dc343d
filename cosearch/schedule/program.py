"""A program: what of a decoder is compiled for one operating point, with flat inputs and outputs.

Inputs are the parameters by sorted path, then the cache's arrays in tree order, then the tokens and positions;
outputs are the logits (and the tokens of a decode program) and the cache. The cache is donated: a step writes it in
place. Being flat, a program needs no tree structure of this code to be loaded and run elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from cosearch.architecture.decoder import Decoder, bind, params_spec
from cosearch.architecture.shape import VOCABULARY
from cosearch.core.errors import Rejected, first_line
from cosearch.core.workload import Phase
from cosearch.kernels.cpu.program import kernels_in


class Compile(Protocol):
    """What compiles a jitted function of these arguments for some chip."""

    def __call__(
        self, function: Any, arguments: Sequence[jax.ShapeDtypeStruct], options: Mapping[str, Any]
    ) -> jax.stages.Compiled:
        """Raises `Rejected` where the compiler refuses the function or an option."""
        ...


def for_default_device(
    function: Any, arguments: Sequence[jax.ShapeDtypeStruct], options: Mapping[str, Any]
) -> jax.stages.Compiled:
    """For the device that JAX runs on."""
    try:
        return function.lower(*arguments).compile(compiler_options=dict(options) or None)
    except jax.errors.JaxRuntimeError as error:
        raise Rejected(f"does not compile: {first_line(error)[:500]}") from None


@dataclass(frozen=True)
class Program:
    """`phase` of `model` for `batch` sequences and a cache of `capacity` tokens each; a prefill takes `chunk` tokens.

    decode:  tokens [batch, steps], position [], noise [steps - 1, batch, 256]
             -> logits [batch, steps, 256], tokens [batch, steps]
    prefill: tokens [batch, chunk], start [], length []
             -> logits [batch, 256]

    A decode program takes `steps` of one token after the other. A token that is given as -1 is chosen by the step
    before: the one of the largest logit plus noise. Without noise that is the likeliest; Gumbel noise times a
    temperature draws at that temperature (Gumbel 1954). There is no noise input where there is one step.
    """

    model: Decoder
    phase: Phase
    batch: int
    capacity: int
    chunk: int = 1
    steps: int = 1

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
            noise = jax.ShapeDtypeStruct((self.steps - 1, self.batch, VOCABULARY), jnp.float32)
            tokens = jax.ShapeDtypeStruct((self.batch, self.steps), jnp.int32)
            return [tokens, scalar, noise] if self.steps > 1 else [tokens, scalar]
        return [jax.ShapeDtypeStruct((self.batch, self.chunk), jnp.int32), scalar, scalar]

    def __call__(self, *arguments: Any) -> tuple[jax.Array, ...]:
        names, count = list(self.params), len(self.cache)
        params = dict(zip(names, arguments[: len(names)], strict=True))
        structure = jax.tree.structure(self.model.cache_spec(self.batch, self.capacity))
        cache = jax.tree.unflatten(structure, arguments[len(names) : len(names) + count])
        model = bind(self.model, params)
        inputs = arguments[len(names) + count :]
        if self.phase == "prefill":
            logits, cache = model.prefill(cache, *inputs)
            return logits, *jax.tree.leaves(cache)
        tokens, position, *noise = inputs
        logits, cache = model.decode_step(cache, tokens[:, 0], position)
        if not noise:
            return logits[:, None], tokens, *jax.tree.leaves(cache)

        def step(state: tuple[Any, jax.Array], each: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            cache, before = state
            given, position, noise = each
            token = jnp.where(given < 0, jnp.argmax(before + noise, axis=-1).astype(given.dtype), given)
            logits, cache = model.decode_step(cache, token, position)
            return (cache, logits), (logits, token)

        following = position + jnp.arange(1, self.steps)
        (cache, _), (more, chosen) = jax.lax.scan(step, (cache, logits), (tokens.T[1:], following, noise[0]))
        every = jnp.concatenate([logits[None], more]).swapaxes(0, 1)
        return every, jnp.concatenate([tokens[:, :1], chosen.T], axis=1), *jax.tree.leaves(cache)

    def jitted(self, formats: Sequence[Format | None] = ()) -> Any:
        """The jitted program, with its cache donated. Where the compiler chooses how parameters and cache lie in
        memory, they lie as `formats` say, if there are any: as it chose for another program that shares them."""
        first, count = len(self.params), len(self.cache)
        given: dict[str, Any] = {"donate_argnums": tuple(range(first, first + count)), "keep_unused": True}
        if self.model.schedule.boundary == "compiler":
            formats = formats or [Format(Layout.AUTO)] * (first + count)
            results = ("logits",) if self.phase == "prefill" else ("logits", "tokens")
            given["in_shardings"] = (*formats, *(None for _ in self.inputs))
            given["out_shardings"] = (*(None for _ in results), *formats[first:])
        return jax.jit(self.__call__, **given)

    def arguments(self) -> list[jax.ShapeDtypeStruct]:
        """The shapes of all inputs."""
        return [*self.params.values(), *self.cache, *self.inputs]

    def kernels(self) -> list[str]:
        """The C++ kernels that it calls (`cosearch.kernels.cpu.program.load`)."""
        return kernels_in(self.jitted().lower(*self.arguments()).as_text())

    def formats(self, compiled: jax.stages.Compiled) -> list[Format | None]:
        """How its parameters, and then its cache, must lie in memory for what it was compiled to; None by default."""
        count = len(self.params) + len(self.cache)
        if self.model.schedule.boundary == "default":
            return [None] * count
        return list(compiled.input_formats[0][:count])

    def compile(
        self, options: Mapping[str, Any], formats: Sequence[Format | None] = (), compiler: Compile = for_default_device
    ) -> jax.stages.Compiled:
        """Compile it; `formats` as in `jitted`.

        Raises:
            Rejected: the compiler refuses the program or an option.
        """
        return compiler(self.jitted(formats), self.arguments(), options)
