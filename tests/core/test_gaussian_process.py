import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad

from cosearch.core import gaussian_process
from cosearch.core.gaussian_process import GaussianProcess

seeds = st.integers(0, 2**31)


def examples(seed: int, count: int = 24, features: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 2, (count, features))
    return x, 3 + np.sin(2 * x[:, 0]) + 0.01 * rng.standard_normal(count)


@settings(max_examples=20)
@given(seeds)
def test_the_gradient_is_that_of_the_posterior(seed: int):
    x, y = examples(seed, count=8)
    squares = np.square(x[:, None, :] - x[None, :, :])
    at = np.random.default_rng(seed).uniform(-1, 0, 3)

    def value(parameters: np.ndarray) -> float:
        return gaussian_process._negative_posterior(parameters, squares, y, np.log(0.3), 2.0)[0]

    def gradient(parameters: np.ndarray) -> np.ndarray:
        return gaussian_process._negative_posterior(parameters, squares, y, np.log(0.3), 2.0)[1]

    assert check_grad(value, gradient, at) < 1e-3 * max(1.0, float(np.abs(gradient(at)).max()))


@settings(max_examples=20)
@given(seeds)
def test_it_knows_its_examples_and_is_less_sure_far_from_them(seed: int):
    x, y = examples(seed)
    process = GaussianProcess.fit(x, y)
    mean, deviation = process.predict(x)
    far = process.predict(np.full((1, 2), 50.0))
    assert np.abs(mean - y).max() < 0.5 * y.std()
    assert far[1][0] > deviation.max()


@settings(max_examples=20)
@given(seeds, st.floats(0.1, 1000), st.floats(-1000, 1000))
def test_units_of_the_values_change_nothing_but_the_units(seed: int, scale: float, shift: float):
    x, y = examples(seed)
    mean, deviation = GaussianProcess.fit(x, y).predict(x[:5] + 0.1)
    scaled_mean, scaled_deviation = GaussianProcess.fit(x, scale * y + shift).predict(x[:5] + 0.1)
    np.testing.assert_allclose(scaled_mean, scale * mean + shift, rtol=1e-2, atol=1e-2 * scale)
    np.testing.assert_allclose(scaled_deviation, scale * deviation, rtol=5e-2)


def test_a_feature_that_never_changes_does_no_harm():
    x, y = examples(0)
    constant = np.hstack([x, np.full((len(x), 1), 7.0)])
    mean, deviation = GaussianProcess.fit(constant, y).predict(constant)
    assert np.isfinite(mean).all()
    assert (deviation > 0).all()


def test_equal_values_are_expected_everywhere():
    x, _ = examples(1)
    mean, deviation = GaussianProcess.fit(x, np.full(len(x), 3.0)).predict(np.vstack([x, x + 5]))
    np.testing.assert_allclose(mean, 3.0, atol=1e-3)
    assert np.isfinite(deviation).all()


def test_one_example_is_known_and_little_else():
    process = GaussianProcess.fit(np.array([[1.0, 2.0]]), np.array([5.0]))
    mean, deviation = process.predict(np.array([[1.0, 2.0], [9.0, 9.0]]))
    np.testing.assert_allclose(mean, 5.0, atol=1e-3)
    assert 0 < deviation[0] < deviation[1]
