from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cosearch.core import pareto
from cosearch.core.problem import LOSS_LIMIT

# A coarse grid, so that equal rows, equal coordinates and points beyond the reference point are common.
coordinates = st.integers(-4, 12).map(lambda step: step / 4)


def losses(objectives: int | None = None) -> st.SearchStrategy[np.ndarray]:
    counts = st.integers(1, 4) if objectives is None else st.just(objectives)
    return counts.flatmap(
        lambda n: st.integers(0, 14).flatmap(lambda rows: arrays(float, (rows, n), elements=coordinates))
    )


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a <= b).all() and (a < b).any())


@given(losses())
def test_front_is_exactly_what_nothing_dominates(points: np.ndarray):
    front = pareto.front(points)
    members = points[front]
    assert len({tuple(row) for row in members}) == len(members)
    assert not any(dominates(a, b) for a in members for b in members)
    for index, row in enumerate(points):
        if index not in front:
            assert any(dominates(member, row) or (member == row).all() for member in members)


@given(losses())
def test_front_is_sorted_and_takes_the_first_of_equals(points: np.ndarray):
    front = pareto.front(points)
    assert [tuple(row) for row in points[front]] == sorted(tuple(row) for row in points[front])
    for index in front:
        assert not any((points[earlier] == points[index]).all() for earlier in range(index))


def brute_force_area(points: np.ndarray) -> float:
    """The area below the reference point, summed over the cells of the grid that the points span."""
    edges = [np.unique([*points[:, axis].clip(max=LOSS_LIMIT), LOSS_LIMIT]) for axis in (0, 1)]
    area = 0.0
    for left, right in zip(edges[0][:-1], edges[0][1:], strict=True):
        for low, high in zip(edges[1][:-1], edges[1][1:], strict=True):
            if any(x <= left and y <= low for x, y in points):
                area += (right - left) * (high - low)
    return area


@given(losses(2))
def test_hypervolume_agrees_with_brute_force(points: np.ndarray):
    assert pareto.hypervolume(points) == pytest.approx(brute_force_area(points), abs=1e-12)


@given(st.data(), losses())
def test_hypervolume_grows_with_points_and_needs_only_the_front(data: Any, points: np.ndarray):
    more = np.vstack([points, data.draw(arrays(float, (1, points.shape[1]), elements=coordinates))])
    assert pareto.hypervolume(more) >= pareto.hypervolume(points) - 1e-12
    assert pareto.hypervolume(points[pareto.front(points)]) == pytest.approx(pareto.hypervolume(points), abs=1e-9)


def test_the_reference_alone_has_volume_one():
    for objectives in (1, 2, 3):
        assert pareto.hypervolume(np.ones((1, objectives))) == pytest.approx(1.0)


def test_knee_is_nearest_to_the_best_of_every_loss_after_scaling():
    assert pareto.knee(np.array([[0.0, 100.0], [0.2, 20.0], [1.0, 0.0]])) == 1
    assert pareto.knee(np.array([[1.0, 3.0], [1.0, 2.0]])) == 1
    assert pareto.knee(np.array([[1.0, 3.0]])) == 0
