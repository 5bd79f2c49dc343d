"""The bench of a worker process: programs compiled for a candidate, ready to be verified and timed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosearch import axes
from cosearch.architecture.decoder import Decoder, pack, plain_decoder
from cosearch.core.candidate import Candidate
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.measure.verify import Reference, Verification, sharp_weights
from cosearch.precision import Precision
from cosearch.schedule import Schedule
from cosearch.schedule.program import Program

_CONTINUED = 5
"""Tokens that are decoded from the cache that a prefill wrote."""
_SEED = 20
"""Of the random weights and tokens that candidates are verified and timed with."""


@dataclass
class Compiled:
    """One operating point of a candidate, compiled, with its inputs on the device.

    A prefill also has the `decode` program of the same cache: only by going on from it does one see what it wrote.
    """

    point: OperatingPoint
    program: Program
    executable: jax.stages.Compiled
    params: list[jax.Array]
    decode: jax.stages.Compiled | None = None

    def empty_cache(self) -> list[jax.Array]:
        return [jnp.zeros(spec.shape, spec.dtype) for spec in self.program.cache]

    def step(self) -> Callable[[], None]:
        """A function that runs this operating point once, at its full context, and waits for the result."""
        cache = self.empty_cache()
        rng = np.random.default_rng(_SEED)
        first = self.program.inputs[0].shape
        inputs: list[Any] = [jnp.asarray(rng.integers(0, 256, first), jnp.int32)]
        if self.point.phase == "decode":
            inputs += [jnp.int32(self.point.context - 1)]
        else:
            inputs += [jnp.int32(0), jnp.int32(self.point.context)]

        def run() -> None:
            nonlocal cache
            logits, *cache = self.executable(*self.params, *cache, *inputs)
            jax.block_until_ready(logits)

        return run

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """The logits [batch, positions, 256] after the last positions of `tokens` [batch, tokens].

        A decode program gives them after each. A prefill takes chunks, the last one not full, and leaves the last few
        tokens to the decode program; it gives the logits after its last and after each of those.
        """
        cache, found = self.empty_cache(), []
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
            found.append(out)
        for position in range(start, count):
            out, *cache = decode(*self.params, *cache, tokens[:, position], np.int32(position))
            found.append(out)
        return np.stack([np.asarray(out) for out in found], axis=1)

    @property
    def temporary_bytes(self) -> int:
        """What it needs while it runs, beside weights and cache."""
        analysis = self.executable.memory_analysis()
        return int(analysis.temp_size_in_bytes) if analysis is not None else 0


class Bench:
    """The candidate that is being worked on. Verification references are kept for the next of the same model."""

    def __init__(self) -> None:
        self._references: dict[tuple[str, int, int], Reference] = {}
        self.uid = ""
        self.programs: list[Compiled] = []

    def compile(self, candidate: Candidate, workload: Workload) -> list[Compiled]:
        """Compile every operating point; keeps them as the current candidate's.

        Raises:
            Rejected: the compiler refuses one.
        """
        self.uid, self.programs = "", []
        self.programs = compile_workload(candidate, axes.decoder(candidate), workload)
        self.uid = candidate.uid
        return self.programs

    def verify(self, candidate: Candidate) -> list[Verification]:
        """Verify every compiled operating point; raises Rejected for a wrong result."""
        verified = []
        for compiled in self.programs:
            reference = self._reference(candidate, compiled.point.batch, compiled.point.context)
            logits = compiled.logits(reference.tokens)
            verified.append(reference.compare(logits))
        return verified

    def _reference(self, candidate: Candidate, batch: int, context: int) -> Reference:
        key = (candidate.quality_axes_key, batch, context)
        if key not in self._references:
            if len(self._references) > 16:
                self._references.clear()
            plain = plain_decoder(axes.served_shape(candidate), Precision.of(candidate.precision))
            tokens = np.random.default_rng(_SEED).integers(0, 256, (batch, context)).astype(np.int32)
            self._references[key] = Reference(plain, pack(plain, sharp_weights(plain.shape, _SEED)), tokens)
        return self._references[key]


def compile_workload(candidate: Candidate, model: Decoder, workload: Workload) -> list[Compiled]:
    """Every operating point of `workload`, compiled, with random weights on the device."""
    options = Schedule.of(candidate.schedule).options
    packed = pack(model, sharp_weights(model.shape, _SEED))
    compiled = []
    for point in workload.points:
        chunk = point.context if point.phase == "prefill" else 1
        program = Program(model, point.phase, point.batch, point.context, chunk)
        params = [jax.device_put(packed[path]) for path in program.params]
        decode = replace(program, phase="decode", chunk=1).compile(options) if point.phase == "prefill" else None
        compiled.append(Compiled(point, program, program.compile(options), params, decode))
    return compiled
