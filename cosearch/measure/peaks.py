"""What the device at hand can do at best, measured once: read bandwidth, arithmetic by dtype, and the least time
that an operation takes. The roofline is drawn from these.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cosearch.kernels import cpu
from cosearch.measure import timing

_READ_BYTES = 256 * 1024 * 1024
_MATRIX = 1024
_CHAIN = 64
_SECONDS = 0.4


def measure(progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Peaks of the default device: the best of repeated runs, since whatever disturbs a run only slows it."""
    dtypes = ("float32", "bfloat16", "int8")
    progress("measuring the read bandwidth", 0.0)
    data = jnp.ones(_READ_BYTES // 4, jnp.float32)
    readers = [jnp.max] if cpu.why_unavailable() or jax.devices()[0].platform != "cpu" else [jnp.max, cpu.read]
    bandwidth = max(_READ_BYTES / _best(jax.jit(read), data) for read in readers)
    del data
    flops = {}
    for index, dtype in enumerate(dtypes):
        progress(f"measuring {dtype} products", (1 + index) / (2 + len(dtypes)))
        matrix = jnp.ones((_MATRIX, _MATRIX), dtype)
        out = jnp.int32 if dtype == "int8" else jnp.float32
        product = jax.jit(lambda a, out=out: jax.lax.dot(a, a, preferred_element_type=out))
        flops[dtype] = 2 * _MATRIX**3 / _best(product, matrix)
    progress("measuring the overhead of an operation", 0.9)

    def chain(x: jax.Array) -> jax.Array:
        for _ in range(_CHAIN):
            x = jax.lax.optimization_barrier(jnp.sort(x))
        return x

    overhead = _best(jax.jit(chain), jnp.arange(8.0)) / _CHAIN
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "bandwidth_bytes_per_s": bandwidth,
        "peak_flops_per_s": flops,
        "overhead_s": overhead,
    }


def _best(run: Callable[..., Any], *arguments: Any) -> float:
    run(*arguments)
    return min(timing.sample(lambda: jax.block_until_ready(run(*arguments)), _SECONDS).sides[0])
