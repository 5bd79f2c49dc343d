"""The learned latency model: a Gaussian process over the logarithm of how far a candidate is from its roofline.

It starts from the roofline alone, and is fitted anew as the archive grows. Memory is predicted the same way, over
the bytes that weights and cache are known to take.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cosearch.core.candidate import Candidate
from cosearch.core.gaussian_process import GaussianProcess
from cosearch.core.problem import Problem
from cosearch.core.space import Space
from cosearch.core.trial import Trial
from cosearch.latency import roofline
from cosearch.latency.features import ChoiceEncoding, physical, work

_UNTRAINED_DEVIATION = 1.0
"""Of the log residual before there are examples: a factor of e either way."""
_LEAST_EXAMPLES = 4


@dataclass(frozen=True)
class Prediction:
    """A metric of n candidates: mean and standard deviation [n], of its logarithm where `logarithmic`; no value is
    below `least` [n]."""

    mean: np.ndarray
    deviation: np.ndarray
    logarithmic: bool = True
    least: np.ndarray | float = -np.inf

    def quantile(self, z: float | np.ndarray) -> np.ndarray:
        """The value `z` deviations from the middle."""
        value = self.mean + z * self.deviation
        return np.maximum(np.exp(value) if self.logarithmic else value, self.least)


class LatencyModel:
    """Predicts `latency_s` and `memory_bytes` for the candidates of one space, target and workload."""

    metrics = ("latency_s", "memory_bytes")

    def __init__(self, space: Space, problem: Problem) -> None:
        self._problem = problem
        self._encode = ChoiceEncoding.of(space, space.reference, "architecture", "precision", "sparsity", "schedule")
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._fitted: dict[str, GaussianProcess] = {}

    def fit(self, trials: Sequence[Trial]) -> None:
        """Learn from the measured figures of `trials`."""
        for metric in self.metrics:
            examples = [trial for trial in trials if metric in trial.metrics]
            if len(examples) >= _LEAST_EXAMPLES:
                features, priors = self._features([trial.candidate for trial in examples])
                values = np.log([trial.metrics[metric].value for trial in examples])
                self._fitted[metric] = GaussianProcess.fit(features, values - priors[:, self.metrics.index(metric)])

    def predict(self, candidates: Sequence[Candidate]) -> dict[str, Prediction]:
        """Predict both metrics of each candidate."""
        features, priors = self._features(candidates)
        predictions = {}
        for index, metric in enumerate(self.metrics):
            mean, deviation = np.zeros(len(candidates)), np.full(len(candidates), _UNTRAINED_DEVIATION)
            if metric in self._fitted:
                mean, deviation = self._fitted[metric].predict(features)
            predictions[metric] = Prediction(priors[:, index] + mean, deviation)
        return predictions

    def _features(self, candidates: Sequence[Candidate]) -> tuple[np.ndarray, np.ndarray]:
        """Features [n, d], and the logarithms of the prior latency and memory [n, 2]."""
        for candidate in candidates:
            if candidate.uid not in self._known:
                self._known[candidate.uid] = self._describe(candidate)
        rows = [self._known[candidate.uid] for candidate in candidates]
        return np.array([features for features, _ in rows]), np.array([priors for _, priors in rows])

    def _describe(self, candidate: Candidate) -> tuple[np.ndarray, np.ndarray]:
        workload, target = self._problem.workload, self._problem.target
        counted = [work(candidate, point) for point in workload.points]
        seconds = roofline.latency_s(candidate, workload, target)
        stored = max(done.weight_bytes + done.cache_bytes for done in counted)
        features = [value for done in counted for value in physical(done)] + self._encode(candidate)
        return np.array([np.log(seconds), *features]), np.log([seconds, stored])
