"""Our side, or plain JAX: a decoder of random weights, compiled as the search compiles its candidates.

usage: python ours.py SIZES FORMAT BATCH [plain]
SIZES is JSON of width, layers, heads, kv_heads and hidden.
"""

import json
import sys
import time
import timeit
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from side import serve

from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.architecture.decoder import Decoder
from cosearch.architecture.feedforward.mlp import MLPShape
from cosearch.architecture.shape import DecoderShape, LayerShape
from cosearch.core.workload import Phase
from cosearch.kernels import cpu
from cosearch.precision import Precision
from cosearch.schedule import Schedule
from cosearch.schedule.program import Program

PRECISIONS = {
    "float32": Precision(kv_cache="bfloat16"),
    "bfloat16": Precision("bfloat16", "bfloat16", "bfloat16"),
    # As llama.cpp's Q8_0 and Q4_0, which multiply integers with inputs rounded to 8 bits.
    "int8": Precision("int8", "bfloat16", "bfloat16", matmul_inputs="int8"),
    "int4": Precision("int4_g32", "bfloat16", "bfloat16", matmul_inputs="int8"),
}
OURS = Schedule("unroll", "cpp", cache_layout="bhsd", fusion="step")
PLAIN = Schedule()
_SLACK = 64
"""Tokens that are decoded after the context."""


def main() -> None:
    sizes, batch, plain = json.loads(sys.argv[1]), int(sys.argv[3]), "plain" in sys.argv[4:]
    attention = SoftmaxShape(sizes["heads"], sizes["kv_heads"], sizes["width"] // sizes["heads"], qk_norm=False)
    shape = DecoderShape(sizes["width"], (LayerShape(attention, MLPShape(sizes["hidden"], True)),) * sizes["layers"])
    model = Decoder(shape, Precision() if plain else PRECISIONS[sys.argv[2]], PLAIN if plain else OURS)
    params = {path: jax.device_put(_random(spec)) for path, spec in Program(model, "decode", 1, 1).params.items()}

    @cache
    def stepper(phase: Phase, capacity: int, chunk: int) -> Callable[[int], float]:
        program = Program(model, phase, batch, capacity, chunk)
        run = program.compile({})
        state = [jnp.zeros(spec.shape, spec.dtype) for spec in program.cache]
        tokens = jnp.zeros(program.inputs[0].shape, jnp.int32)

        def step(position: int) -> float:
            nonlocal state
            start = time.perf_counter()
            out = run(*params.values(), *state, tokens, *([position] if phase == "decode" else [0, chunk]))
            state = jax.block_until_ready(list(out[-len(state) :]))
            return time.perf_counter() - start

        step(0)
        return step

    def decode(context: int, tokens: int) -> list[float]:
        step = stepper("decode", context + _SLACK, 1)
        step(context)
        return [step(context + token % _SLACK) for token in range(tokens)]

    def prefill(tokens: int) -> list[float]:
        return [stepper("prefill", tokens, tokens)(0)]

    @cache
    def reader(read_bytes: int) -> Callable[[], None]:
        data, run = jnp.ones(read_bytes // 4, jnp.float32), jax.jit(cpu.read)
        return lambda: jax.block_until_ready(run(data))

    def bandwidth(read_bytes: int) -> list[float]:
        return timeit.repeat(reader(read_bytes), number=1, repeat=6)

    serve({"decode": decode, "prefill": prefill, "bandwidth": bandwidth})


def _random(spec: jax.ShapeDtypeStruct) -> np.ndarray:
    """Codes of any value, and scales and weights that keep numbers calm."""
    rng = np.random.default_rng(0)
    kind = np.dtype(spec.dtype)
    if kind.kind in "iu":
        return rng.integers(np.iinfo(kind).min, np.iinfo(kind).max, spec.shape, kind, endpoint=True)
    return (rng.random(spec.shape, np.float32) * 0.02 - 0.01).astype(kind)


if __name__ == "__main__":
    main()
