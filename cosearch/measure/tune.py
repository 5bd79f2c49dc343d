"""Tuning the C++ kernels of products: few measurements, chosen by a model, each side by side with the shipped tiles."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cosearch.core.gaussian_process import GaussianProcess
from cosearch.kernels import Product
from cosearch.kernels.cpu import operations
from cosearch.kernels.cpu.program import Program
from cosearch.kernels.cpu.tiles import Tiles, choices, is_tuned, keep, shipped
from cosearch.measure import timing
from cosearch.measure.verify_kernel import storage_of

LEAST_BYTES = 1 << 18
"""Smaller matrices take no longer than it takes to begin."""
_COLD_BYTES = 1 << 26
_MOST_COPIES = 64
_FIRST, _MOST = 4, 10
"""Tiles that are tried before the model is asked, and in all."""
_ROUNDS = 21
_LEAST_S = 1.0
"""For a product: in less nothing is learnt of it."""
_SURE = 5
"""Rounds of a first, short look; what looks worse by a tenth there is not timed further."""


def tune(product: Product, seconds: float = 3.0) -> Tiles:
    """The best tiles found for a product in about so many seconds after the shipped ones were compiled. They are kept
    for all that runs later here, if there was time to try some.

    Raises:
        Rejected: the product's kernel cannot be compiled.
    """
    start = shipped(product)
    left = [tiles for tiles in choices(product) if tiles != start]
    product_with = _products(product)
    base = product_with(start)
    until = time.monotonic() + seconds
    rng = np.random.default_rng(0)
    tried: dict[Tiles, float] = {start: 0.0}  # the logarithm of the time over that of `start`
    sure: dict[Tiles, bool] = {}
    while left and len(tried) <= _MOST and time.monotonic() < until:
        tiles = left.pop(_next(left, tried, rng))
        run = product_with(tiles)
        samples = timing.side_by_side([run, base], _SURE).sides
        ratio = float(np.median(np.log(samples[0]) - np.log(samples[1])))
        if ratio < 0.1:
            samples = timing.side_by_side([run, base], _ROUNDS, seed=len(tried)).sides
            ratio = float(np.median(np.log(samples[0]) - np.log(samples[1])))
            sure[tiles] = timing.compare(*samples) == timing.Verdict.FASTER
        tried[tiles] = ratio
    # The winner of many looks better than it is: only what was surely faster takes the place of what is shipped.
    best = min((tiles for tiles in tried if sure.get(tiles)), key=lambda tiles: tried[tiles], default=start)
    if not left or len(tried) > min(_FIRST, _MOST):
        keep(product, best)
    return best


def tune_all(products: list[Product], seconds: float) -> None:
    """Tune those of the products that are worth it and were not tuned yet, in about so many seconds, of which each
    has its share; where that would be too little, the last are left for another time."""
    until = time.monotonic() + seconds
    new = [one for one in dict.fromkeys(products) if _stored_bytes(one) >= LEAST_BYTES and not is_tuned(one)]
    for index, product in enumerate(new):
        left = until - time.monotonic()
        if left > 0:
            tune(product, max(left / (len(new) - index), _LEAST_S))


def _next(left: list[Tiles], tried: dict[Tiles, float], rng: np.random.Generator) -> int:
    """Which of `left` to try: at first any, then what may be best by a Gaussian process over those that were tried."""
    if len(tried) <= _FIRST:
        return int(rng.integers(len(left)))
    model = GaussianProcess.fit(np.array([_features(one) for one in tried]), np.array(list(tried.values())))
    mean, deviation = model.predict(np.array([_features(one) for one in left]))
    return int(np.argmin(mean - deviation))


def _features(tiles: Tiles) -> list[float]:
    return [
        float(np.log2(value + 1))
        for value in (tiles.rows, tiles.tokens, tiles.panel_bytes, tiles.ahead_bytes / 64, tiles.chunks)
    ]


def _stored_bytes(product: Product) -> int:
    return sum(part.size * part.dtype.itemsize for part in _spec(product).values())


def _products(product: Product) -> Callable[[Tiles], timing.Run]:
    """For tiles, a run of the product from one copy of a matrix after the other, as many as no cache holds."""
    count = max(1, min(_MOST_COPIES, _COLD_BYTES // max(_stored_bytes(product), 1)))
    rng = np.random.default_rng(0)
    copies = [{part: jnp.asarray(_any(rng, one)) for part, one in _spec(product).items()} for _ in range(count)]
    x = jnp.asarray(rng.standard_normal((product.tokens, product.rows), np.float32))

    def make(tiles: Tiles) -> timing.Run:
        def run(x: jax.Array, copies: list[dict[str, jax.Array]]) -> jax.Array:
            program = Program()
            out = program.result((product.tokens, product.columns))
            at = program.argument(x)
            for stored in copies:
                factors = [operations.Factor(stored, product.columns)]
                operations.matmul(program, at, factors, product, out, tiles=tiles)
            return program.call()[0]

        compiled = jax.jit(run).lower(x, copies).compile()
        return lambda: jax.block_until_ready(compiled(x, copies))

    return make


def _spec(product: Product) -> dict[str, jax.ShapeDtypeStruct]:
    return storage_of(product).spec((product.rows, product.columns))


def _any(rng: np.random.Generator, spec: jax.ShapeDtypeStruct) -> np.ndarray:
    if jnp.issubdtype(spec.dtype, jnp.integer):
        bits = jnp.iinfo(spec.dtype)
        return rng.integers(int(bits.min), int(bits.max), spec.shape, spec.dtype, endpoint=True)
    return (rng.random(spec.shape, np.float32) * 0.02).astype(spec.dtype)
