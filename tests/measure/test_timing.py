import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosearch.core.errors import Rejected
from cosearch.measure import timing


def samples(seed: int, count: int = 200, scale: float = 1e-3, noise: float = 0.1) -> list[float]:
    """Seconds as they are on a machine that others use too: some noise, and now and then a long one."""
    rng = np.random.default_rng(seed)
    return (scale * rng.lognormal(0, noise, count) * np.where(rng.random(count) < 0.05, 5, 1)).tolist()


@given(st.lists(st.floats(1e-7, 10.0), min_size=1, max_size=60))
@settings(max_examples=50)
def test_the_median_lies_in_its_interval_and_that_within_the_samples(values: list[float]):
    median, (low, high) = timing.median_interval(values)
    assert min(values) <= low <= high <= max(values)
    assert median == pytest.approx(float(np.median(values)))


def test_the_interval_of_a_median_narrows_with_more_samples():
    def width(count: int) -> float:
        _, (low, high) = timing.median_interval(samples(0, count))
        return high - low

    assert width(2000) < width(50) / 2


def test_nine_in_ten_intervals_of_a_median_hold_the_true_one():
    held = 0
    for seed in range(200):
        _, (low, high) = timing.median_interval(np.random.default_rng(seed).lognormal(0, 0.2, 60).tolist())
        held += low <= 1.0 <= high
    assert 165 <= held <= 195


def test_of_the_same_thing_twice_the_ratio_is_1():
    held = 0
    for seed in range(100):
        ratio, (low, high) = timing.ratio_interval(samples(seed), samples(seed + 1000))
        assert low <= ratio <= high
        held += low <= 1.0 <= high
    assert held >= 82


def test_a_true_gain_is_found_under_a_load_that_both_sides_share():
    rng = np.random.default_rng(0)
    load = np.repeat(rng.choice([1.0, 1.6], 20), 10)
    ours, others = (np.array(samples(seed, noise=0.03)) * load for seed in (1, 2))
    ratio, (low, high) = timing.ratio_interval(ours.tolist(), (1.3 * others).tolist())
    assert 1.2 < low <= ratio <= high < 1.4


def test_the_ratio_of_swapped_sides_is_the_inverse():
    ours, others = samples(1), [1.5 * second for second in samples(2)]
    ratio, (low, high) = timing.ratio_interval(ours, others)
    inverse, (inverse_low, inverse_high) = timing.ratio_interval(others, ours)
    assert inverse == pytest.approx(1 / ratio)
    assert (inverse_low, inverse_high) == pytest.approx((1 / high, 1 / low))


def test_intervals_are_the_same_for_the_same_samples():
    assert timing.median_interval(samples(3)) == timing.median_interval(samples(3))
    assert timing.ratio_interval(samples(3), samples(4)) == timing.ratio_interval(samples(3), samples(4))


def orders(rounds: int, sides: int, seed: int) -> list[list[int]]:
    called: list[int] = []
    runs = [lambda side=side: called.append(side) for side in range(sides)]
    found = timing.side_by_side(runs, rounds, seed).sides
    assert [len(side) for side in found] == [rounds] * sides
    assert all(second >= 0 for side in found for second in side)
    assert called[:sides] == list(range(sides)), "each is warmed up first"
    turns = called[sides::2]
    assert called[sides + 1 :: 2] == turns, "each timed run follows an untimed one of its own"
    return [turns[start : start + sides] for start in range(0, len(turns), sides)]


@pytest.mark.parametrize("sides", [2, 3])
def test_side_by_side_takes_each_once_a_round_in_random_order(sides: int):
    rounds = orders(200, sides, seed=0)
    assert all(sorted(order) == list(range(sides)) for order in rounds)
    for side in range(sides):
        first = sum(order[0] == side for order in rounds)
        assert 0.7 * 200 / sides < first < 1.3 * 200 / sides
    # No short period that a periodic load could keep in step with.
    for period in range(1, 20):
        assert sum(a == b for a, b in zip(rounds, rounds[period:], strict=False)) < 0.8 * len(rounds)


def test_the_order_is_the_seeds():
    assert orders(50, 2, seed=1) == orders(50, 2, seed=1) != orders(50, 2, seed=2)


def test_slow_sides_have_fewer_rounds_but_never_too_few():
    def slow() -> None:
        time.sleep(0.002)

    rounds = [len(timing.side_by_side([slow, slow], 200, seconds=seconds).sides[0]) for seconds in (0.4, 0.0)]
    assert 20 < rounds[0] < 120 and rounds[1] == 20


def test_sample_warms_up_and_keeps_every_run():
    count = 0

    def run() -> None:
        nonlocal count
        count += 1
        time.sleep(0.001)

    (found,) = timing.sample(run, 0.1).sides
    assert 20 <= len(found) <= 400
    assert count > len(found)
    assert all(second >= 0.001 for second in found)


def test_sample_is_bounded_for_what_is_very_slow_or_very_fast():
    assert len(timing.sample(lambda: time.sleep(0.02), 0.0).sides[0]) == 20
    assert len(timing.sample(lambda: None, 10.0).sides[0]) == 400


class Clock:
    """A clock that stands still but where something is told to take time; reading it may go wrong."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.wrong: Iterator[float] = iter(())
        patch.setattr(time, "perf_counter", lambda: self.now + next(self.wrong, 0.0))

    def taking(self, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds()

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_what_the_clock_says_took_no_time_or_less_is_no_sample(clock: Clock):
    run = clock.taking(lambda: 1e-3)
    run()
    clock.wrong = iter([0.0] * 120 + [0.002, 0.0, 0.0, 0.0, 0.001, 0.0])
    (found,) = timing.sample(run, 0.1).sides
    assert len(found) >= 20 and min(found) == pytest.approx(1e-3)


def test_what_takes_no_time_at_all_is_impossible(clock: Clock):
    with pytest.raises(Rejected, match=r"^impossible: it takes no time that the clock could tell"):
        timing.side_by_side([clock.taking(lambda: 1e-3), clock.taking(lambda: 0.0)], 5)


class Load:
    """Something else on the machine, from one second to another: everything takes three times as long."""

    def __init__(self, clock: Clock, start: float, end: float) -> None:
        self._clock, self._start, self._end = clock, start, end
        self.canary = timing.Canary(self.taking(1e-4))

    def taking(self, seconds: float) -> Callable[[], None]:
        busy = (lambda: self._start <= self._clock.now < self._end) if self._end else (lambda: False)
        return self._clock.taking(lambda: seconds * (3 if busy() else 1))


def test_what_was_timed_under_load_is_timed_again(clock: Clock):
    load = Load(clock, 0.3, 0.6)
    timed = timing.sample(load.taking(1e-3), 0.3, load.canary)
    assert timed.contended == 0
    assert timed.sides[0] == pytest.approx([1e-3] * len(timed.sides[0]))
    assert sum(timed.sides[0]) >= 0.3


@pytest.mark.parametrize(("warm_ups", "contended"), [(1, 1.0), (10, 0.0)])
def test_a_host_that_waited_is_not_under_load(clock: Clock, warm_ups: int, contended: float):
    """After each run that was waited for, the next 7 starts take three times as long."""
    slow = [0]
    settle = clock.taking(lambda: 1e-4 * (3 if slow[0] > 0 else 1))

    def start() -> None:
        settle()
        slow[0] -= 1

    def wait() -> None:
        clock.taking(lambda: 5e-3)()
        slow[0] = 7

    timed = timing.sample(wait, 0.3, timing.Canary(start, warm_ups))
    assert timed.contended == contended


def test_what_stays_under_load_is_marked(clock: Clock):
    load = Load(clock, 0.09, 100.0)
    timed = timing.sample(load.taking(1e-3), 0.3, load.canary)
    assert timed.contended > 0.8
    assert sum(timed.sides[0]) >= 0.9, "patience is three times what was asked for"
    assert clock.now < 2.0


def test_rounds_under_load_are_run_again_for_both_sides(clock: Clock):
    load = Load(clock, 0.3, 0.6)
    timed = timing.side_by_side([load.taking(1e-3), load.taking(2e-3)], 100, canary=load.canary)
    assert timed.contended == 0 and len(timed.sides[0]) >= 100
    for side, seconds in zip(timed.sides, (1e-3, 2e-3), strict=True):
        assert side == pytest.approx([seconds] * len(side))


def rounds(rng: np.random.Generator, gain: float, quiet: bool = False) -> tuple[list[float], list[float]]:
    """600 rounds of two sides in random order: noise of each run, bursts that last a while, and a clock that drifts."""
    count, noise = 600, 0.06 if quiet else 0.08
    level = np.exp(np.cumsum(rng.normal(0, 0.003, 2 * count)))
    if not quiet:
        for start in rng.integers(0, 2 * count, 12):
            level[start : start + rng.integers(1, 40)] *= rng.uniform(1.2, 3)
    level *= rng.lognormal(0, noise, 2 * count) * np.where(rng.random(2 * count) < 0.03, rng.uniform(2, 9), 1)
    pairs = 1e-3 * level.reshape(count, 2)
    pairs = np.where(rng.random((count, 1)) < 0.5, pairs, pairs[:, ::-1])
    return pairs[:, 0].tolist(), (gain * pairs[:, 1]).tolist()


@pytest.mark.parametrize("quiet", [True, False])
def test_the_same_thing_twice_is_undecided(quiet: bool):
    verdicts = [timing.compare(*rounds(np.random.default_rng(seed), 1.0, quiet)) for seed in range(1000)]
    assert sum(verdict != timing.Verdict.UNDECIDED for verdict in verdicts) <= 5


@pytest.mark.parametrize(("quiet", "least"), [(True, 0.98), (False, 0.7)])
def test_a_gain_of_three_percent_is_found(quiet: bool, least: float):
    verdicts = [timing.compare(*rounds(np.random.default_rng(seed), 1.03, quiet)) for seed in range(200)]
    assert np.mean([verdict == timing.Verdict.FASTER for verdict in verdicts]) >= least
    assert timing.Verdict.SLOWER not in verdicts


def test_swapped_sides_have_the_opposite_verdict():
    ours, others = rounds(np.random.default_rng(0), 1.1)
    assert (timing.compare(ours, others), timing.compare(others, ours)) == ("faster", "slower")


def test_a_small_difference_is_undecided_however_sure():
    assert timing.compare([1.0] * 1000, [1.014] * 1000) == "undecided"
    assert timing.compare([1.0] * 1000, [1.016] * 1000) == "faster"


def test_too_few_rounds_decide_nothing():
    assert timing.compare([], []) == timing.compare([1.0] * 8, [2.0] * 8) == "undecided"
