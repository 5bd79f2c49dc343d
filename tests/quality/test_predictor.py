import numpy as np
import pytest

from cosearch.core.candidate import Candidate
from cosearch.core.metric import measured
from cosearch.core.space import Space
from cosearch.core.trial import Trial
from cosearch.quality.predictor import QualityModel
from cosearch.testing import small_space

KNOBS = {
    "architecture.width": [32, 64, 96, 128, 192],
    "architecture.depth": [1, 2],
    "architecture.head_dim": [16],
    "precision.weights": ["float32", "int8"],
    "schedule.cache_layout": ["bshd", "bhsd", "bhds"],
}


@pytest.fixture(scope="module")
def space() -> Space:
    return small_space(KNOBS)


def every(space: Space) -> list[Candidate]:
    return [candidate for raw in space.points() if (candidate := space.candidate(raw))]


def trial(candidate: Candidate, bits: float | None = None) -> Trial:
    """Wider and deeper models are better, and int8 costs a little."""
    width, depth = candidate.architecture["width"], candidate.architecture["depth"]
    assert isinstance(width, int) and isinstance(depth, int)
    rule = 4.0 * width**-0.1 * depth**-0.05 * (1.02 if candidate.precision["weights"] == "int8" else 1.0)
    metrics = {
        "bits_per_byte": measured("bits_per_byte", rule if bits is None else bits),
        "recall_accuracy": measured("recall_accuracy", 0.5 + 0.1 * depth),
    }
    return Trial(candidate, latency_key=candidate.uid, quality_key=candidate.quality_axes_key, metrics=metrics)


def test_schedules_of_one_model_are_predicted_alike(space: Space):
    model = QualityModel(space)
    candidates = every(space)
    model.fit([trial(candidate) for candidate in candidates[::2]])
    bits = model.predict(candidates)["bits_per_byte"].mean
    by_model: dict[str, set[float]] = {}
    for candidate, value in zip(candidates, bits, strict=True):
        by_model.setdefault(candidate.quality_axes_key, set()).add(float(value))
    assert len(by_model) == 20
    assert all(len(values) == 1 for values in by_model.values())


def test_trials_that_share_a_model_count_once(space: Space):
    candidates = every(space)
    first = [candidate for candidate in candidates if candidate.schedule["cache_layout"] == "bshd"][:12]
    once, often = QualityModel(space), QualityModel(space)
    once.fit([trial(candidate) for candidate in first])
    keys = {candidate.quality_axes_key for candidate in first}
    often.fit([trial(candidate) for candidate in candidates if candidate.quality_axes_key in keys])
    for metric, prediction in once.predict(candidates).items():
        other = often.predict(candidates)[metric]
        np.testing.assert_allclose(prediction.mean, other.mean, rtol=1e-6)
        np.testing.assert_allclose(prediction.deviation, other.deviation, rtol=1e-4)


def test_it_learns_from_models_of_other_sizes(space: Space):
    candidates = [candidate for candidate in every(space) if candidate.schedule["cache_layout"] == "bshd"]
    seen, held_out = candidates[::2], candidates[1::2]
    model = QualityModel(space)
    untrained = model.predict(held_out)["bits_per_byte"]
    model.fit([trial(candidate) for candidate in seen])
    learnt = model.predict(held_out)["bits_per_byte"]
    truth = np.array([trial(candidate).values["bits_per_byte"] for candidate in held_out])
    assert np.median(np.abs(learnt.quantile(0.0) / truth - 1)) < 0.03
    assert (learnt.deviation < untrained.deviation).all()


def test_failed_trials_teach_it_nothing(space: Space):
    candidates = every(space)[:8]
    model = QualityModel(space)
    model.fit([Trial(one, latency_key=one.uid, quality_key=one.quality_axes_key) for one in candidates])
    assert model.predict(candidates)["recall_accuracy"].mean.tolist() == [0.6] * 8
