from collections.abc import Callable

import numpy as np
import pytest

from cosearch.core.errors import Rejected
from cosearch.sparsity.criteria import largest, saliency, sparsegpt
from cosearch.sparsity.n_m import NMCompression

CRITERIA = ("magnitude", "wanda", "sparsegpt")


def moment_of(inputs: np.ndarray) -> np.ndarray:
    return inputs.T @ inputs / len(inputs)


def by_saliency(weights: np.ndarray, moment: np.ndarray | None, kept: int, group: int) -> np.ndarray:
    compression = NMCompression(kept, group)
    compressed = compression.compress(weights, "in_out", saliency(weights, moment))
    return compression.expand(*compressed, len(weights), "in_out")


def output_error(inputs: np.ndarray, weights: np.ndarray, criterion: str, kept: int = 2, group: int = 4) -> float:
    moment = moment_of(inputs)
    if criterion == "sparsegpt":
        pruned = sparsegpt(weights, moment, kept, group)
    else:
        pruned = by_saliency(weights, moment if criterion == "wanda" else None, kept, group)
    return float(np.square(inputs @ (pruned - weights)).sum())


def test_the_saliency_is_what_the_output_loses_of_one_weight():
    weights, inputs = np.array([[3.0, -1.0], [0.5, 2.0]]), np.array([[1.0, 10.0], [-1.0, 30.0]])
    np.testing.assert_array_equal(saliency(weights, None), weights**2)
    np.testing.assert_array_equal(saliency(weights, moment_of(inputs)), weights**2 * [[1.0], [500.0]])


def test_of_equal_scores_the_first_stay_and_nan_comes_before_all():
    scores = np.array([[1.0, np.nan], [2.0, 1.0], [1.0, 1.0], [1.0, np.inf]])
    np.testing.assert_array_equal(largest(scores, 2), [[0, 0], [1, 3]])


def test_small_weights_of_loud_inputs_stay_by_wanda_and_go_by_magnitude():
    weights = np.array([[4.0], [3.0], [2.0], [1.0]] * 4, np.float32)
    moment = np.diag([1.0, 1.0, 1.0, 100.0] * 4)
    by_magnitude = by_saliency(weights, None, 2, 4)
    np.testing.assert_array_equal(by_magnitude[:, 0], [4, 3, 0, 0] * 4)
    by_wanda = by_saliency(weights, moment, 2, 4)
    np.testing.assert_array_equal(by_wanda[:, 0], [4, 0, 0, 1] * 4)
    assert by_wanda.dtype == np.float32


@pytest.mark.parametrize("prune", [by_saliency, sparsegpt])
def test_a_matrix_that_saw_no_input_goes_by_magnitude(prune: Callable[..., np.ndarray]):
    weights = np.random.default_rng(0).standard_normal((16, 3))
    expected = by_saliency(weights, None, 1, 4)
    np.testing.assert_array_equal(prune(weights, np.zeros((16, 16)), 1, 4), expected)


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (1, 4)])
def test_sparsegpt_loses_least_on_inputs_that_correlate_and_wanda_less_than_magnitude_on_loud_ones(
    kept: int, group: int
):
    rng = np.random.default_rng(1)
    loud = np.where(np.arange(64) % 7 == 0, 10.0, 1.0)
    mixed = rng.standard_normal((400, 16)) @ rng.standard_normal((16, 64)) / 4
    inputs = (mixed + 0.3 * rng.standard_normal((400, 64))) * loud
    weights = rng.standard_normal((64, 24)) / 8
    magnitude, wanda, sparsegpt = (output_error(inputs, weights, each, kept, group) for each in CRITERIA)
    assert sparsegpt < 0.7 * wanda
    assert wanda < 0.7 * magnitude


def test_sparsegpt_is_wanda_where_inputs_do_not_correlate():
    rng = np.random.default_rng(2)
    weights, moment = rng.standard_normal((32, 8)), np.diag(rng.uniform(1, 2, 32))
    pruned = sparsegpt(weights, moment, 2, 4)
    # The damping adds the same to every input, which may turn a near tie; these have none.
    expected = by_saliency(weights, moment + 0.01 * np.trace(moment) / 32 * np.eye(32), 2, 4)
    np.testing.assert_allclose(pruned, expected, rtol=1e-12)


def test_sparsegpt_gives_to_a_copy_of_an_input_what_the_other_had():
    # Inputs 3 and 4 are the same: the weight that goes from the first group is made up for in the second.
    inputs = np.random.default_rng(3).standard_normal((500, 8))
    inputs[:, 4] = inputs[:, 3]
    weights = np.array([[9.0], [8.0], [0.1], [1.0], [7.0], [6.0], [0.1], [0.1]])
    pruned = sparsegpt(weights, moment_of(inputs), 2, 4)
    np.testing.assert_array_equal(pruned[[2, 3, 6, 7]], 0)
    assert abs(pruned[4, 0] - 8) < 0.2


def test_moments_that_overflowed_are_refused():
    moment = np.full((4, 4), np.inf)
    with pytest.raises(Rejected, match="moments of a matrix's inputs are not finite"):
        sparsegpt(np.ones((4, 1)), moment, 2, 4)
