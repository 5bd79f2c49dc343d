import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    found = timing.side_by_side(runs, rounds, seed)
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


def test_sample_warms_up_and_keeps_every_run():
    count = 0

    def run() -> None:
        nonlocal count
        count += 1
        time.sleep(0.001)

    found = timing.sample(run, 0.1)
    assert 20 <= len(found) <= 400
    assert count > len(found)
    assert all(second >= 0.001 for second in found)


def test_sample_is_bounded_for_what_is_very_slow_or_very_fast():
    assert len(timing.sample(lambda: time.sleep(0.02), 0.0)) == 20
    assert len(timing.sample(lambda: None, 10.0)) == 400
