"""The learned latency model: what the shared network expects of a candidate's operations, summed, and a Gaussian
process over the logarithm of how far a candidate is from that.

It starts from what the network learnt on this processor, or on another one, or from the roofline: from what predicts
best what is measured here. It is fitted anew as the archive grows. Memory is predicted the same way, over the bytes
that weights and cache are known to take.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cosearch.core.candidate import Candidate, content_hash
from cosearch.core.gaussian_process import GaussianProcess
from cosearch.core.metric import Z90
from cosearch.core.problem import Problem
from cosearch.core.space import Space
from cosearch.core.trial import Trial
from cosearch.latency.batch import Operations
from cosearch.latency.encoding import Encoding
from cosearch.latency.network import RateNetwork, Seconds

VERSION = 3
"""Of what the model makes of its data; figures of another are not of the same model."""

_UNTRAINED_DEVIATION = 1.0
"""Of the log residual before there are examples: a factor of e either way."""
_LEAST_EXAMPLES = 4
_AFTER_ROOFLINE, _AFTER_NETWORK = (0.1, 2.0), (0.6, 4.0)
"""Which part of what is left is likely noise, and the likely log length scales of the rest: what a trained network
leaves has little to do with single choices."""
_CHUNK = 8192
"""Candidates that are described at a time: as many as stay in the caches."""
_THREADS = 2
_LEAST_CALIBRATED = 20
"""Examples from which on intervals are widened or narrowed to what held of examples that were left out."""


@dataclass(frozen=True)
class Prediction:
    """A metric of n candidates: mean and standard deviation [n], of its logarithm where `logarithmic`; no value is
    below `least` [n]. `model` says which version predicted it, and from which data."""

    mean: np.ndarray
    deviation: np.ndarray
    logarithmic: bool = True
    least: np.ndarray | float = -np.inf
    model: str = ""

    def quantile(self, z: float | np.ndarray) -> np.ndarray:
        """The value `z` deviations from the middle."""
        value = self.mean + z * self.deviation
        return np.maximum(np.exp(value) if self.logarithmic else value, self.least)


class LatencyModel:
    """Predicts `latency_s` and `memory_bytes` for the candidates of one space, target and workload, and `energy_j`
    where the problem reads it: what it is a second is learnt."""

    metrics: tuple[str, ...] = ("latency_s", "memory_bytes")

    def __init__(self, space: Space, problem: Problem, network: RateNetwork | None = None) -> None:
        self._problem = problem
        if "energy_j" in problem.reads:
            self.metrics = (*self.metrics, "energy_j")
        network = network or RateNetwork.load(problem.target.platform)
        self._operations = [Operations(space, point) for point in problem.workload.points]
        # This processor first, where the network knows it: that is what counts before there are examples.
        known = sorted(network.processors, key=lambda name: name not in problem.target.source)
        starts = [*((network, name) for name in known), (RateNetwork.untrained() if known else network, "")]
        self._starts = [
            [Seconds(start, one, problem.target, name) for one in self._operations] for start, name in starts
        ]
        self._seconds = self._starts[0]
        self.encoding: Encoding = self._operations[0].encoding
        self._fitted: dict[str, GaussianProcess] = {}
        self._scale: dict[str, float] = dict.fromkeys(self.metrics, 1.0)
        self._data: dict[str, str] = dict.fromkeys(self.metrics, "nothing")

    def name(self, metric: str) -> str:
        """The version, and the fingerprint of the trials that predictions of a metric were fitted to."""
        return f"latency {VERSION}, fitted to {self._data[metric]}"

    def why_not(self, candidate: Candidate) -> str | None:
        """Why nothing is predicted of a candidate: it chooses what the space does not offer."""
        return self.encoding.why_not(candidate)

    def fit(self, trials: Sequence[Trial]) -> None:
        """Learn from the measured figures of `trials`."""
        for metric in self.metrics:
            examples = [trial for trial in trials if metric in trial.metrics]
            if len(examples) < _LEAST_EXAMPLES:
                continue
            rows = self.encoding.rows([trial.candidate for trial in examples])
            values = np.log([trial.metrics[metric].value for trial in examples])
            fits = [self._fit(metric, rows, values, *option) for option in self._options(metric)]
            _, deviations, self._fitted[metric], seconds = min(fits, key=lambda fit: fit[0])
            if metric == "latency_s":
                self._seconds = seconds
            if len(examples) >= _LEAST_CALIBRATED:
                self._scale[metric] = deviations / Z90
            told = sorted((trial.uid, trial.metrics[metric].value) for trial in examples)
            self._data[metric] = f"{len(examples)} trials {content_hash(told)}"

    def _options(self, metric: str) -> list[tuple[list[Seconds], tuple[float, float]]]:
        """Where to start from, and what is likely of the rest; this machine may be like another that the network knows,
        or like none."""
        if metric != "latency_s":
            return [(self._seconds, _AFTER_ROOFLINE)]
        *learnt, roofline = self._starts
        return [*((start, _AFTER_NETWORK) for start in learnt), (roofline, _AFTER_ROOFLINE)]

    def _fit(
        self, metric: str, rows: np.ndarray, values: np.ndarray, seconds: list[Seconds], prior: tuple[float, float]
    ) -> tuple[float, float, GaussianProcess, list[Seconds]]:
        """A process, and before it how far off it is of examples that are left out: in the mean, and, for nine tenths
        of them, in its own deviations."""
        self._seconds, before = seconds, self._seconds
        features, priors, _ = self._describe(rows)
        self._seconds = before
        residual = values - priors[:, self.metrics.index(metric)]
        process = GaussianProcess.fit(features, residual, *prior)
        mean, deviation = process.left_out()
        off = np.abs(residual - mean)
        return float(off.mean()), float(np.quantile(off / deviation, 0.9)), process, seconds

    def predict(self, candidates: Sequence[Candidate]) -> dict[str, Prediction]:
        """Predict all metrics of each candidate.

        Raises:
            Rejected: `why_not` speaks of one.
        """
        return self.predict_rows(self.encoding.rows(candidates), self.metrics)

    def predict_rows(self, rows: np.ndarray, metrics: Sequence[str] = metrics) -> dict[str, Prediction]:
        """Predict some `metrics` of each row of `self.encoding`; thousands are screened by this. Of a row that is not
        legal all are infinite."""
        described, found = [], []
        with ThreadPoolExecutor(_THREADS) as threads:
            # Tables grow, so that one chunk after the other is described, beside the predictions for those before.
            for first in range(0, max(len(rows), 1), _CHUNK):
                described.append(self._describe(rows[first : first + _CHUNK]))
                found.append(threads.submit(self._predict, described[-1], metrics))
        predictions = {}
        for metric in metrics:
            mean, deviation = (np.concatenate([one.result()[metric][part] for one in found]) for part in (0, 1))
            least = np.concatenate([one[2] for one in described]) if metric == "memory_bytes" else -np.inf
            predictions[metric] = Prediction(mean, deviation, least=least, model=self.name(metric))
        return predictions

    def _predict(
        self, described: tuple[np.ndarray, np.ndarray, np.ndarray], metrics: Sequence[str]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        features, priors, _ = described
        found = {}
        for metric in metrics:
            mean, deviation = np.zeros(len(features)), np.full(len(features), _UNTRAINED_DEVIATION)
            if metric in self._fitted:
                mean, deviation = self._fitted[metric].predict(features)
            found[metric] = (priors[:, self.metrics.index(metric)] + mean, self._scale[metric] * deviation)
        return found

    def _describe(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features [n, d], the logarithms of what is expected of each metric before [n, metrics], and the bytes that
        are stored [n]; of a row that is not legal these are 0, infinite and 0."""
        workload = self._problem.workload
        features = self.encoding.features(rows)
        amounts, seconds, stored, legal = [], 0.0, np.zeros(len(rows)), np.ones(len(rows), bool)
        for point, operations, expect in zip(workload.points, self._operations, self._seconds, strict=True):
            batch = operations(rows)
            expected = expect.log_seconds(batch, features)
            share = point.weight / (point.tokens / point.batch) / sum(one.weight for one in workload.points)
            seconds = seconds + share * np.exp(expected.mean(axis=0))
            held = batch.weight_bytes + batch.cache_bytes
            stored = np.maximum(stored, held)
            amounts += [held, *batch.size.sum(axis=1)[:, :3].T]
            legal &= batch.legal
        known = np.log(np.where(legal, [seconds, *amounts], 1.0)).T
        priors = {"latency_s": seconds, "memory_bytes": stored, "energy_j": seconds}
        expected = np.where(legal, [priors[metric] for metric in self.metrics], np.inf)
        return np.column_stack([known, features]), np.log(expected).T, stored
