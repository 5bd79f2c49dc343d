"""The bench of a worker process: programs compiled for a candidate, ready to be verified and timed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format

from cosearch import axes
from cosearch.architecture.decoder import Decoder, pack, plain_decoder
from cosearch.core.candidate import Candidate
from cosearch.core.errors import Rejected
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.latency.hlo import Module
from cosearch.measure import timing
from cosearch.measure.verify import Reference, Verification, digest, sharp_weights
from cosearch.precision import Precision
from cosearch.schedule import Schedule
from cosearch.schedule.program import Compile, Program, for_default_device

_CONTINUED = 5
"""Tokens that are decoded from the cache that a prefill wrote."""
_MOST_COPIES = 256
"""Making so many of a small model takes 0.2 s. Models below 1/256 of the bytes to go round stay in caches in part."""
_CANARY_SIZE = 128
_SETTLING_RUNS = 10
"""Of the canary on an accelerator: a host that waited starts programs slowly at first, on an H200's in 0.15 ms, and
after 7 of them in the 0.045 ms that it takes them without waiting."""
_REPEATED = 16
"""Tokens that are decoded twice, to see whether the same comes out."""


@dataclass
class Compiled:
    """One operating point of a candidate, compiled, with its inputs on the device.

    A prefill also has a `decode` program of one step over the same cache: only by going on from it does one see what it
    wrote.
    """

    point: OperatingPoint
    program: Program
    executable: jax.stages.Compiled
    params: list[jax.Array]
    decode: jax.stages.Compiled | None = None

    @property
    def formats(self) -> list[Format | None]:
        """How parameters, and then the cache, lie in memory (`Program.formats`)."""
        return self.program.formats(self.executable)

    def empty_cache(self) -> list[jax.Array]:
        return self._placed([jnp.zeros(spec.shape, spec.dtype) for spec in self.program.cache])

    def _placed(self, cache: Sequence[jax.Array]) -> list[jax.Array]:
        return list(map(jax.device_put, cache, self.formats[len(self.params) :]))

    def used_cache(self, seed: int) -> list[jax.Array]:
        """A cache whose slots hold what another sequence may have left there: anything finite, for programs read
        every slot and weight by 0 what is not theirs. States start from zero, as they must."""
        rng, model, point = np.random.default_rng(seed), self.program.model, self.program
        attentions = [layer.attention for layer in model.shape.layers if layer.attention is not None]
        slotted = {name for one in attentions for name in one.cache(point.batch, point.capacity)}
        arrays = []
        for path, spec in jax.tree_util.tree_leaves_with_path(model.cache_spec(point.batch, point.capacity)):
            left = slotted.intersection(getattr(key, "key", None) for key in path)
            arrays.append(jnp.asarray(_any_finite(rng, spec) if left else np.zeros(spec.shape, spec.dtype)))
        return self._placed(arrays)

    def logits(self, tokens: np.ndarray, seed: int) -> np.ndarray:
        """The logits [batch, positions, 256] after the last positions of `tokens` [batch, tokens], from a cache that
        `seed` draws.

        A decode program gives them after each. A prefill takes chunks, the last one not full, and leaves the last few
        tokens to the decode program; it gives the logits after its last and after each of those.
        """
        cache, found = self.used_cache(seed), []
        chunk, count = self.program.chunk, tokens.shape[1]
        decode, start = self.executable, 0
        if self.point.phase == "prefill":
            assert self.decode is not None
            decode, start = self.decode, max(count - _CONTINUED, 1)
            out: Any = None  # there is always a chunk
            for first in range(0, start, chunk):
                piece = tokens[:, first : min(first + chunk, start)]
                padded = np.zeros((len(tokens), chunk), np.int32)
                padded[:, : piece.shape[1]] = piece
                at = (np.int32(first), np.int32(piece.shape[1]))
                out, *cache = self.executable(*self.params, *cache, padded, *at)
            found.append(out[:, None])
        steps = self.program.steps if decode is self.executable else 1
        more = [np.zeros((steps - 1, len(tokens), 256), np.float32)] if steps > 1 else []
        for position in range(start, count, steps):
            given = np.zeros((len(tokens), steps), np.int32)  # what follows the last token changes nothing before it
            piece = tokens[:, position : position + steps]
            given[:, : piece.shape[1]] = piece
            out, _, *cache = decode(*self.params, *cache, given, np.int32(position), *more)
            found.append(out[:, : piece.shape[1]])
        return np.concatenate([np.asarray(out) for out in found], axis=1)

    @property
    def copied_bytes(self) -> int:
        """How much of the cache a run copies as a whole: nothing, where it is written in place."""
        return round(Module(self.executable.as_text() or "").copied_bytes(self.program.cache))


def memory_bytes(executable: jax.stages.Compiled) -> int:
    """All that a compiled program takes of the chip's memory while it runs, by its compiler's own account: inputs as
    they lie in memory, which on TPUs is in whole tiles, results that do not take an input's place, temporaries, and its
    code where that lies there.

    Not in it is the scratch memory of C++ kernels, of 4 MiB for each thread, which belongs to the process.

    Raises:
        Rejected: the compiler gives no account.
    """
    account = executable.memory_analysis()
    if account is None:
        raise Rejected("the compiler does not say what its program takes in memory")
    results = account.output_size_in_bytes - account.alias_size_in_bytes
    held = account.argument_size_in_bytes + account.generated_code_size_in_bytes
    return int(held + results + account.temp_size_in_bytes)


def compile_point(
    model: Decoder, point: OperatingPoint, options: dict[str, Any], compiler: Compile = for_default_device
) -> tuple[Program, jax.stages.Compiled, jax.stages.Compiled | None]:
    """The program of an operating point, what it was compiled to, and for a prefill the decode step beside it.

    Raises:
        Rejected: the compiler refuses one.
    """
    chunk = point.context if point.phase == "prefill" else 1
    steps = min(model.schedule.steps, point.context) if point.phase == "decode" else 1
    program = Program(model, point.phase, point.batch, point.context, chunk, steps)
    step = replace(program, phase="decode", chunk=1)
    decode = step.compile(options, (), compiler) if point.phase == "prefill" else None
    executable = program.compile(options, () if decode is None else step.formats(decode), compiler)
    return program, executable, decode


def steps(programs: Sequence[Compiled], cold_bytes: int = 0, seed: int = 0) -> list[timing.Run]:
    """Functions that run each program once, at its full context, and wait for the result.

    Each run takes the next of as many copies of weights and cache as are `cold_bytes` together, so that it finds none
    of them in caches that hold less: what is timed is a run that reads all it needs from memory, as where other models
    or other work had their turn before. Of a run of several steps the first reads from memory, and the others find what
    caches keep, as they do where it serves. Copies of several programs are made by turns in random order, for where
    in memory they lie made one side of a comparison with itself up to 8 % slower.
    """
    rng = np.random.default_rng(seed)
    copying = [
        jax.jit(lambda arrays: [jnp.copy(array) for array in arrays], out_shardings=one.formats[: len(one.params)])
        for one in programs
    ]
    copies: list[list[tuple[list[jax.Array], list[jax.Array]]]] = [[] for _ in programs]
    wanted = []
    for index, program in enumerate(programs):
        size = sum(one.size * one.dtype.itemsize for one in [*program.params, *program.program.cache])
        # Odd, so that all of them are timed where every second run is.
        wanted += [index] * (min(-(-cold_bytes // size), _MOST_COPIES) | 1)
    for index in rng.permutation(wanted):
        made = copying[index](programs[index].params), programs[index].empty_cache()
        copies[index].append(jax.block_until_ready(made))
    return [_step(program, own, rng) for program, own in zip(programs, copies, strict=True)]


def _step(
    program: Compiled, copies: list[tuple[list[jax.Array], list[jax.Array]]], rng: np.random.Generator
) -> timing.Run:
    point, turn = program.point, 0
    tokens, *rest = program.program.inputs
    inputs: list[Any] = [jnp.asarray(rng.integers(0, 256, tokens.shape), jnp.int32)]
    # Of several steps the last has the whole context.
    last = max(point.context - program.program.steps, 0)
    inputs += map(jnp.int32, [last] if point.phase == "decode" else [0, point.context])
    inputs += [jnp.zeros(spec.shape, spec.dtype) for spec in rest[len(inputs) - 1 :]]

    def run() -> None:
        nonlocal turn
        params, cache = copies[turn]
        logits, *written = program.executable(*params, *cache, *inputs)
        written = written[len(written) - len(cache) :]
        jax.block_until_ready(logits)
        copies[turn] = params, written
        turn = (turn + 1) % len(copies)

    return run


class Bench:
    """The candidate that is being worked on."""

    def __init__(self) -> None:
        self.uid = ""
        self.programs: list[Compiled] = []
        self._seed = 0
        self._weights: dict[str, np.ndarray] = {}

    def compile(
        self, candidate: Candidate, workload: Workload, seed: int = 0, portable: bool = False
    ) -> list[Compiled]:
        """Compile every operating point, with weights drawn by `seed`; keeps them as the current candidate's. A
        `portable` one is the same mathematics as XLA alone runs it anywhere, without the candidate's options.

        Raises:
            Rejected: the compiler refuses one.
        """
        self.uid, self.programs, self._seed = "", [], seed
        model = axes.portable_decoder(candidate) if portable else axes.decoder(candidate)
        options = {} if portable else Schedule.of(candidate.schedule).options
        self._weights = sharp_weights(model.shape, seed)
        packed = pack(model, self._weights)
        for point in workload.points:
            program, executable, decode = compile_point(model, point, options)
            formats = program.formats(executable)[: len(program.params)]
            params = [jax.device_put(packed[path], one) for path, one in zip(program.params, formats, strict=True)]
            self.programs.append(Compiled(point, program, executable, params, decode))
        self.uid = candidate.uid
        return self.programs

    def verify(self, candidate: Candidate) -> list[Verification]:
        """Verify every compiled operating point on tokens that are drawn anew.

        Raises:
            Rejected: a result is wrong, is another one when it is computed again, or the weights are no longer what
                they were.
        """
        plain = plain_decoder(axes.served_shape(candidate), Precision.of(candidate.precision))
        packed, references, verified = pack(plain, self._weights), {}, []
        for compiled in self.programs:
            point, before = compiled.point, digest(compiled.params)
            if (point.batch, point.context) not in references:
                tokens = np.random.default_rng(self._seed).integers(0, 256, (point.batch, point.context))
                references[point.batch, point.context] = Reference(plain, packed, tokens.astype(np.int32))
            reference = references[point.batch, point.context]
            logits = compiled.logits(reference.tokens, self._seed)
            verified.append(reference.compare(logits))
            few = None if point.phase == "prefill" else _REPEATED
            again = compiled.logits(reference.tokens[:, :few], self._seed + 1)
            if digest(compiled.params) != before:
                raise Rejected("wrong result: it overwrites the weights that it is given")
            if not np.array_equal(again, logits[:, :few]):
                raise Rejected("wrong result: the same inputs give other logits when they are computed again")
        return verified


def _any_finite(rng: np.random.Generator, spec: jax.ShapeDtypeStruct) -> np.ndarray:
    if jnp.issubdtype(spec.dtype, jnp.integer):
        bits = jnp.iinfo(spec.dtype)
        return rng.integers(int(bits.min), int(bits.max), spec.shape, endpoint=True).astype(spec.dtype)
    return rng.uniform(1, 100, spec.shape).astype(spec.dtype)


def device_canary() -> timing.Canary:
    """A small product, which keeps every core of a processor busy for some 0.1 ms."""
    matrix, product = jnp.ones((_CANARY_SIZE, _CANARY_SIZE)), jax.jit(lambda a: a @ a)

    def work() -> None:
        jax.block_until_ready(product(matrix))

    return timing.Canary(work, 1 if jax.devices()[0].platform == "cpu" else _SETTLING_RUNS)
