"""What quality a candidate's model will have, from models that were trained and evaluated before."""

from collections.abc import Sequence

import numpy as np

from cosearch import axes
from cosearch.core.candidate import Candidate
from cosearch.core.gaussian_process import GaussianProcess
from cosearch.core.space import Space
from cosearch.core.trial import Trial
from cosearch.latency.encoding import Encoding
from cosearch.latency.model import Prediction
from cosearch.precision import Precision
from cosearch.quality.serve import few_bits

_UNTRAINED = {"bits_per_byte": (np.log(3.0), 0.3, True), "recall_accuracy": (0.6, 0.3, False)}
"""Mean, deviation and whether logarithmic, before there are examples: what short trainings on text give."""
_LEAST_EXAMPLES = 4
_KNOWN_DEVIATION = 1e-6
_MOST_GAIN = 0.005
"""By how much less a pruned or rounded model has in bits per byte, at most, than the whole one: by luck alone."""


class QualityModel:
    """Predicts `bits_per_byte` and `recall_accuracy`; trials that share a model count once."""

    metrics = tuple(_UNTRAINED)

    def __init__(self, space: Space) -> None:
        self._encoding = Encoding(space)
        self._sizes: dict[str, tuple[float, float]] = {}
        self._fitted: dict[str, GaussianProcess] = {}
        self._measured: dict[str, Trial] = {}
        self._least: dict[str, float] = {}

    def fit(self, trials: Sequence[Trial]) -> None:
        """Learn from the measured figures of `trials`."""
        complete = [trial for trial in trials if set(self.metrics) <= trial.metrics.keys()]
        models = {trial.candidate.quality_axes_key: trial for trial in complete}
        self._measured = models
        for trial in models.values():
            if _whole(trial.candidate):
                least = (1 - _MOST_GAIN) * trial.metrics["bits_per_byte"].value
                key = trial.candidate.key("architecture")
                self._least[key] = min(least, self._least.get(key, least))
        if len(models) < _LEAST_EXAMPLES:
            return
        features = self._features([trial.candidate for trial in models.values()])
        for metric, (_, _, logarithmic) in _UNTRAINED.items():
            values = np.array([trial.metrics[metric].value for trial in models.values()])
            self._fitted[metric] = GaussianProcess.fit(features, np.log(values) if logarithmic else values)

    def predict(self, candidates: Sequence[Candidate]) -> dict[str, Prediction]:
        """Predict both metrics of each candidate."""
        features, predictions = self._features(candidates), {}
        for metric, (mean, deviation, logarithmic) in _UNTRAINED.items():
            means, deviations = np.full(len(candidates), mean), np.full(len(candidates), deviation)
            if metric in self._fitted:
                means, deviations = self._fitted[metric].predict(features)
            for index, candidate in enumerate(candidates):
                # A schedule does not change quality, so what was measured under another one is known.
                if trial := self._measured.get(candidate.quality_axes_key):
                    value = trial.metrics[metric].value
                    means[index], deviations[index] = np.log(value) if logarithmic else value, _KNOWN_DEVIATION
            least = self._least if metric == "bits_per_byte" else {}
            floor = np.array([least.get(candidate.key("architecture"), -np.inf) for candidate in candidates])
            predictions[metric] = Prediction(means, deviations, logarithmic, floor)
        return predictions

    def _features(self, candidates: Sequence[Candidate]) -> np.ndarray:
        for candidate in candidates:
            key = candidate.quality_axes_key
            if key not in self._sizes:
                self._sizes[key] = axes.dense_shape(candidate).parameters, axes.served_shape(candidate).parameters
        sizes = [self._sizes[candidate.quality_axes_key] for candidate in candidates]
        chosen = self._encoding.features(self._encoding.rows(candidates), ("architecture", "precision", "sparsity"))
        return np.column_stack([np.log(sizes), chosen])


def _whole(candidate: Candidate) -> bool:
    """Whether nothing is pruned or stored in few bits."""
    shape = axes.served_shape(candidate)
    return shape == axes.dense_shape(candidate) and not few_bits(shape, Precision.of(candidate.precision)).rules
