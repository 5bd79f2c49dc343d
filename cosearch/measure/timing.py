"""Timing compiled programs: warmed up, beside a canary, in random order where there are sides, all samples kept.

A figure is a median with its bootstrap interval. A comparison of two sides is a `Verdict`, from rounds in which both
were run: whatever else loads the machine then disturbs both alike.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from cosearch.core.errors import Rejected

_WARM_UP_S = 0.05
_LEAST_ROUNDS, _MOST_ROUNDS = 20, 400
_PATIENCE = 3
"""How many times as much as it was asked for is tried, until as much was not disturbed."""
_LEAST_TICKS = 10
"""Of the clock, that a run must take: less is no measurement. Clocks that jump back give less than none."""
_CANARY_RUNS, _QUIET_QUANTILE, _DISTURBED = 400, 0.02, 1.8
"""The least of a canary's runs are quiet on a busy machine, too: what the fiftieth part of them takes at most is what a
quiet one takes, and one that takes 1.8 times as long was disturbed."""
_BETWEEN_CANARIES_S = 1e-3
_SURE, _LEAST_GAIN = 4.0, 0.015
"""Copies of one program do differ a little, by where in memory they lie, so that fewer deviations would not do. Of 300
comparisons of the same executable none was decided by these, half of them beside a compiler (experiments/timing)."""

Run = Callable[[], None]


class Verdict(StrEnum):
    """What a comparison of two sides shows."""

    FASTER = "faster"
    SLOWER = "slower"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Timed:
    """Seconds of every run, by side, one a round; `contended` is the part of the rounds beside a disturbed canary."""

    sides: list[list[float]]
    contended: float = 0.0


class Canary:
    """A tiny fixed piece of work whose time on a quiet machine is known: where it takes much longer, something else
    runs there."""

    def __init__(self, work: Run, warm_ups: int = 1) -> None:
        self._work, self._warm_ups = work, warm_ups
        self.quiet_s = float(np.quantile([self._seconds() for _ in range(_CANARY_RUNS)], _QUIET_QUANTILE))

    def is_disturbed(self) -> bool:
        """Run it now."""
        return self._seconds() > _DISTURBED * self.quiet_s

    def _seconds(self) -> float:
        for _ in range(self._warm_ups):
            self._work()  # its data and its threads are back after what was timed
        return _seconds(self._work)


def sample(run: Run, seconds: float, canary: Canary | None = None) -> Timed:
    """Time `run` over about `seconds`, after a warm-up.

    Raises:
        Rejected: it is too short for the clock.
    """
    until = time.perf_counter() + _WARM_UP_S
    run()
    while time.perf_counter() < until:
        run()

    def enough(rounds: Sequence[list[float]], times: int) -> bool:
        count = len(rounds)
        long = count >= times * _MOST_ROUNDS or sum(one for (one,) in rounds) >= times * seconds
        return count >= times * _LEAST_ROUNDS and long

    return _collect(lambda: [_seconds(run)], enough, canary)


def side_by_side(
    runs: Sequence[Run], rounds: int, seed: int = 0, canary: Canary | None = None, seconds: float = math.inf
) -> Timed:
    """Time each of `runs` in each round, in random order: so many `rounds`, or fewer where they take long, but the
    least that there must be, in about so many `seconds`, or three times that on a busy machine.

    A fixed order lets a periodic load favour one side (18 false wins in 180 under load, 0 in 630 in random order).

    Raises:
        Rejected: one is too short for the clock.
    """
    rng = np.random.default_rng(seed)
    for run in runs:
        run()

    def one_round() -> list[float]:
        seconds = [0.0] * len(runs)
        for index in rng.permutation(len(runs)):
            runs[index]()  # its code and its threads are back after the other's turn
            seconds[index] = _seconds(runs[index])
        return seconds

    start = time.perf_counter()

    def enough(found: Sequence[list[float]], times: int) -> bool:
        late = time.perf_counter() - start >= times * seconds
        return len(found) >= times * (min(rounds, _LEAST_ROUNDS) if late else rounds)

    return _collect(one_round, enough, canary)


def _collect(
    one_round: Callable[[], list[float]], enough: Callable[[Sequence[list[float]], int], bool], canary: Canary | None
) -> Timed:
    """Run rounds until there are enough between canaries that were not disturbed, or patience ends."""
    every: list[list[float]] = []
    quiet: list[list[float]] = []
    before = canary is not None and canary.is_disturbed()
    while not enough(quiet, 1) and not enough(every, _PATIENCE):
        block = [one_round()]
        while canary is not None and sum(map(sum, block)) < _BETWEEN_CANARIES_S:
            block.append(one_round())
        after = canary is not None and canary.is_disturbed()
        every += block
        if not before and not after:
            quiet += block
        before = after
    # Which rounds are left out is for the canaries to say, never for the rounds themselves.
    kept = quiet if enough(quiet, 1) or len(quiet) >= _LEAST_ROUNDS else every
    return Timed(
        [list(side) for side in zip(*kept, strict=True)], 0.0 if kept is quiet else 1 - len(quiet) / len(every)
    )


def _seconds(run: Run) -> float:
    for _ in range(_MOST_ROUNDS):
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        if seconds >= _LEAST_TICKS * time.get_clock_info("perf_counter").resolution:
            return seconds
    raise Rejected("impossible: it takes no time that the clock could tell")


def compare(samples: Sequence[float], others: Sequence[float]) -> Verdict:
    """Whether `samples` are faster or slower than `others`, of the same rounds.

    By Wilcoxon's signed-rank test (1945) of the rounds' ratios: in random order either side is as likely to be the
    slower one of a round, however the load goes up and down between rounds. Below 20 rounds, or a difference of 1.5 %,
    it is undecided.
    """
    if len(samples) < _LEAST_ROUNDS:
        return Verdict.UNDECIDED
    gains = np.log(others) - np.log(samples)
    ranks = np.abs(gains).argsort().argsort() + 1.0
    deviations = np.sign(gains) @ ranks / np.linalg.norm(ranks)
    if min(abs(deviations) - _SURE, abs(np.median(gains)) - np.log1p(_LEAST_GAIN)) < 0:
        return Verdict.UNDECIDED
    return Verdict.FASTER if deviations > 0 else Verdict.SLOWER


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
