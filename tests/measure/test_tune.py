"""The tuner keeps what was surely faster, once for each product."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from cosearch.kernels import Product
from cosearch.kernels.cpu.tiles import Tiles, choices, is_tuned, shipped, tiles_for
from cosearch.measure import timing, tune

PRODUCT = Product(1, 1024, 1024, "int8", "out_in")
SMALL = Product(1, 64, 64, "int8", "out_in")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("COSEARCH_CACHE", str(tmp_path))
    yield tmp_path / "kernels" / "tiles"


class Machine:
    """Runs that take what `seconds` says of their tiles, give or take `noise`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Tiles], float], noise: float = 0.01) -> None:
        self.seconds, self.noise, self.timed = seconds, noise, list[Tiles]()
        self._rng = random.Random(0)
        monkeypatch.setattr(tune, "_products", lambda product: lambda one: one)
        monkeypatch.setattr(timing, "side_by_side", self.side_by_side)

    def side_by_side(self, runs: Sequence[Tiles], rounds: int, seed: int = 0) -> timing.Timed:
        self.timed.append(runs[0])
        sides = [
            [self.seconds(one) * math.exp(self.noise * self._rng.gauss(0, 1)) for _ in range(rounds)] for one in runs
        ]
        return timing.Timed(sides)


def test_what_is_surely_faster_is_kept(monkeypatch: pytest.MonkeyPatch):
    fast = {one for one in choices(PRODUCT) if one.chunks >= 4}
    machine = Machine(monkeypatch, lambda one: 0.5 if one in fast else 1.0)
    found = tune.tune(PRODUCT)
    assert found in fast and found in machine.timed
    assert tiles_for(PRODUCT) == found and is_tuned(PRODUCT)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.5])
def test_what_is_not_surely_faster_is_not_kept(monkeypatch: pytest.MonkeyPatch, noise: float):
    Machine(monkeypatch, lambda one: 1.0, noise)
    assert tune.tune(PRODUCT) == shipped(PRODUCT) == tiles_for(PRODUCT)
    assert is_tuned(PRODUCT), "nor is it measured again"


def test_what_is_slower_is_looked_at_once_and_shortly(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(monkeypatch, lambda one: 1.0 if one == shipped(PRODUCT) else 2.0)
    tune.tune(PRODUCT)
    assert len(machine.timed) == len(set(machine.timed)) == tune._MOST
    assert shipped(PRODUCT) not in machine.timed


def test_a_product_is_tuned_once_and_by_whoever_comes_first(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(monkeypatch, lambda one: 1.0)
    tune.tune_all([PRODUCT, PRODUCT], 60)
    count = len(machine.timed)
    assert count > 0
    tune.tune_all([PRODUCT], 60)
    assert len(machine.timed) == count


def test_a_file_that_is_broken_is_measured_again(kept: Path, monkeypatch: pytest.MonkeyPatch):
    machine = Machine(monkeypatch, lambda one: 1.0)
    tune.tune_all([PRODUCT], 60)
    count, (path,) = len(machine.timed), kept.iterdir()
    path.write_text("{")
    tune.tune_all([PRODUCT], 60)
    assert len(machine.timed) == 2 * count and is_tuned(PRODUCT)


def test_what_too_little_was_tried_for_is_not_tuned(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(monkeypatch, lambda one: 1.0)
    assert tune.tune(PRODUCT, 0) == shipped(PRODUCT)
    assert machine.timed == [] and not is_tuned(PRODUCT)
    now = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    tune.tune(PRODUCT, 2.5)
    assert 0 < len(set(machine.timed)) < tune._FIRST and not is_tuned(PRODUCT)


def test_each_product_has_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch):
    others = [Product(1, 1024, columns, "int8", "out_in") for columns in (2048, 4096)]
    shares: list[float] = []
    monkeypatch.setattr(tune, "tune", lambda product, seconds: shares.append(seconds))
    tune.tune_all([PRODUCT, *others, PRODUCT], 60)
    assert [round(share) for share in shares] == [20, 30, 60], "these took none of it"
    shares.clear()
    tune.tune_all([PRODUCT, *others], 0.9)
    assert shares == [1.0] * 3, "no less, for in less nothing is learnt"


def test_small_products_and_ones_without_time_are_left_alone(kept: Path, monkeypatch: pytest.MonkeyPatch):
    machine = Machine(monkeypatch, lambda one: 1.0)
    tune.tune_all([SMALL], 60)
    tune.tune_all([PRODUCT], 0)
    assert machine.timed == [] and not kept.exists()


@pytest.mark.compiler
@pytest.mark.parametrize("tokens", [1, 4])
def test_products_are_really_run(tokens: int, quick_kernels: None, monkeypatch: pytest.MonkeyPatch):
    """With one comparison, of one round: this says nothing of speed."""
    compare, timed = timing.side_by_side, list[timing.Timed]()

    def once(runs: Sequence[timing.Run], rounds: int, seed: int = 0) -> timing.Timed:
        timed.append(compare(runs, 1, seed))
        return timed[-1]

    monkeypatch.setattr(timing, "side_by_side", once)
    monkeypatch.setattr(tune, "_MOST", 1)
    monkeypatch.setattr(tune, "_COLD_BYTES", 1 << 19)
    product = Product(tokens, 512, 512, "int8", "out_in")
    assert tune.tune(product) == shipped(product), "one round decides nothing"
    assert timed and all(seconds > 0 for side in timed[0].sides for seconds in side)
    assert is_tuned(product)
