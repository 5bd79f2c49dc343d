"""Timing compiled programs: warmed up, every run's seconds kept, the median with a bootstrap interval."""

import time
from collections.abc import Callable, Sequence

import numpy as np

_WARM_UP_S = 0.05
_LEAST_RUNS, _MOST_RUNS = 20, 400


def sample(run: Callable[[], None], seconds: float) -> list[float]:
    """Seconds of each run, over about `seconds` of them, after a warm-up."""
    until = time.perf_counter() + _WARM_UP_S
    run()
    while time.perf_counter() < until:
        run()
    samples: list[float] = []
    while len(samples) < _LEAST_RUNS or (sum(samples) < seconds and len(samples) < _MOST_RUNS):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return samples


def side_by_side(runs: Sequence[Callable[[], None]], rounds: int, seed: int = 0) -> list[list[float]]:
    """Seconds of each of `runs`, interleaved, in random order within each round.

    A fixed order lets a periodic load favour one side (18 false wins in 180 under load, 0 in 630 in random order).
    """
    rng = np.random.default_rng(seed)
    samples: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(rounds):
        for index in rng.permutation(len(runs)):
            runs[index]()  # back in the caches after the other's turn
            start = time.perf_counter()
            runs[index]()
            samples[index].append(time.perf_counter() - start)
    return samples


def median_interval(samples: Sequence[float], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """The median and its 90 % bootstrap interval."""
    values = np.asarray(samples)
    medians = np.median(np.random.default_rng(seed).choice(values, (400, len(values))), axis=1)
    low, high = np.quantile(medians, [0.05, 0.95])
    return float(np.median(values)), (float(low), float(high))


def ratio_interval(
    samples: Sequence[float], others: Sequence[float], seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """The ratio of the medians of `others` to `samples`, of paired rounds, with its 90 % bootstrap interval."""
    pairs = np.array([samples, others])
    draws = np.random.default_rng(seed).integers(0, pairs.shape[1], (400, pairs.shape[1]))
    below, above = np.median(pairs[:, draws], axis=2)
    low, high = np.quantile(above / below, [0.05, 0.95])
    return float(np.median(others) / np.median(samples)), (float(low), float(high))
