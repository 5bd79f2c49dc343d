"""Chips that are drawn from a known law: what is learnt of them must be that law, and intervals must hold."""

import numpy as np
import pytest

from cosearch.latency.transfer import Function, Linear, Prior, Smooth, principal

ROWS = 400
RNG = np.random.default_rng(0)
X = RNG.uniform(-2, 2, (ROWS, 2))
FUNCTION = Function(
    np.sin(X[:, 0]),
    (Linear("scale", np.ones((ROWS, 1))), Linear("slope", X[:, :1]), Smooth("smooth", X)),
)
NOISE = 0.02


def chip(seed: int, scale: float = 0.4, slope: float = 0.2) -> np.ndarray:
    """A chip that differs by a factor and by a slope."""
    rng = np.random.default_rng(seed)
    own = scale * rng.normal() + slope * rng.normal() * X[:, 0]
    return FUNCTION.mean + own + NOISE * rng.normal(size=ROWS)


@pytest.fixture(scope="module")
def prior() -> Prior:
    return Prior.fit([(FUNCTION, np.arange(ROWS), chip(seed)) for seed in range(8)], [3, 10])


def test_amplitudes_are_those_by_which_chips_differ(prior: Prior) -> None:
    assert 0.2 < prior.amplitudes["scale"] < 0.8
    assert 0.08 < prior.amplitudes["slope"] < 0.5
    assert prior.amplitudes["smooth"] < 0.03, "no chip differs by a smooth function"


def test_few_measurements_adapt_to_a_new_chip(prior: Prior) -> None:
    errors, held = {0: [], 3: [], 10: []}, []
    for seed in range(100, 120):
        truth = chip(seed)
        chosen = prior.choose(FUNCTION, np.arange(ROWS), 10)
        for count, found in errors.items():
            taken = chosen[:count]
            mean, deviation = prior.adapt(FUNCTION, taken, truth[taken]).predict(np.arange(ROWS))
            found.append(np.abs(mean - truth).mean())
            if count:
                held.append(np.abs(mean - truth) <= 1.645 * deviation)
    assert np.mean(errors[3]) < 0.2 * np.mean(errors[0])
    assert np.mean(errors[10]) < 1.5 * NOISE
    assert 0.85 < np.mean(held) < 0.99


def test_chosen_rows_tell_more_than_random_ones(prior: Prior) -> None:
    def left(rows: np.ndarray) -> float:
        _, deviation = prior.adapt(FUNCTION, rows, FUNCTION.mean[rows]).predict(np.arange(ROWS))
        return float(deviation.mean())

    chosen = prior.choose(FUNCTION, np.arange(ROWS), 3)
    assert len(set(chosen.tolist())) == 3
    assert left(chosen) < np.mean([left(RNG.choice(ROWS, 3, replace=False)) for _ in range(20)])


def test_a_measurement_that_was_disturbed_changes_little(prior: Prior) -> None:
    truth, taken = chip(7), prior.choose(FUNCTION, np.arange(ROWS), 12)
    disturbed = truth[taken].copy()
    disturbed[5] += 1.5
    clean, _ = prior.adapt(FUNCTION, taken, truth[taken]).predict(np.arange(ROWS))
    found, _ = prior.adapt(FUNCTION, taken, disturbed).predict(np.arange(ROWS))
    assert np.abs(found - clean).max() < 0.15


def test_a_chip_unlike_all_others_gets_wider_intervals(prior: Prior) -> None:
    taken = prior.choose(FUNCTION, np.arange(ROWS), 5)
    usual, strange = chip(3), chip(3) + 2.0 * X[:, 0]
    _, narrow = prior.adapt(FUNCTION, taken, usual[taken]).predict(np.arange(ROWS))
    _, wide = prior.adapt(FUNCTION, taken, strange[taken]).predict(np.arange(ROWS))
    assert wide.mean() > narrow.mean()


def test_without_measured_chips_the_prior_is_what_blocks_expect() -> None:
    prior = Prior.fit([], [10])
    mean, deviation = prior.adapt(FUNCTION, np.arange(0), np.zeros(0)).predict(np.arange(ROWS))
    np.testing.assert_allclose(mean, FUNCTION.mean)
    assert (deviation > 0.1).all()


def test_principal_functions_have_the_covariance_of_what_they_are_of() -> None:
    functions = RNG.normal(size=(3, 50))
    columns = principal(functions)
    np.testing.assert_allclose(columns @ columns.T, functions.T @ functions / 3, atol=1e-6)
