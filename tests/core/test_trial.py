import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cosearch.core.candidate import Candidate, canonical_json
from cosearch.core.metric import UNITS, Metric, measured, predicted
from cosearch.core.trial import Failure, Trial

numbers = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | st.text(max_size=8)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
metrics = st.dictionaries(
    st.sampled_from(sorted(UNITS)),
    st.builds(
        Metric,
        numbers,
        st.sampled_from(sorted(set(UNITS.values()))),
        st.sampled_from(["measured", "predicted"]),
        st.none() | st.tuples(numbers, numbers),
        st.lists(numbers, max_size=4).map(tuple),
    ),
    max_size=4,
)
knob_values = (
    st.booleans() | st.integers(0, 9) | st.text(max_size=4) | st.lists(st.integers(0, 9), max_size=3).map(tuple)
)
points = st.dictionaries(
    st.sampled_from(["architecture.a", "precision.b", "sparsity.c", "schedule.d"]), knob_values, max_size=4
)
trials = st.builds(
    Trial,
    candidate=points.map(Candidate.from_point),
    latency_key=st.text(max_size=6),
    quality_key=st.text(max_size=6),
    metrics=metrics,
    predictions=metrics,
    failure=st.none() | st.builds(Failure, st.text(max_size=6), st.text(max_size=20)),
    seconds=st.dictionaries(st.text(max_size=6), numbers, max_size=3),
    reused=st.lists(st.text(max_size=6), max_size=3).map(tuple),
    fingerprint=st.dictionaries(st.text(max_size=6), json_values, max_size=3),
)


@given(trials)
def test_a_trial_round_trips_through_its_json_exactly(trial: Trial):
    text = canonical_json(trial.to_json())
    again = Trial.from_json(json.loads(text))
    assert again == trial
    assert again.uid == trial.uid
    assert canonical_json(again.to_json()) == text


@given(metrics)
def test_a_metric_round_trips_with_and_without_samples(named: dict[str, Any]):
    for metric in named.values():
        assert Metric.from_json(json.loads(json.dumps(metric.to_json()))) == metric
        short = metric.to_json(with_samples=False)
        assert "samples" not in short
        assert Metric.from_json(short).samples == ()
        assert Metric.from_json(short).value == metric.value


def test_measured_and_predicted_figures_say_what_they_are():
    figure = measured("latency_s", 1, samples=(1.0, 1.5))
    assert (figure.value, figure.unit, figure.source, figure.interval) == (1.0, "s/token", "measured", None)
    guess = predicted("memory_bytes", 10, (8.0, 12.0))
    assert (guess.value, guess.unit, guess.source, guess.interval) == (10.0, "bytes", "predicted", (8.0, 12.0))


def test_values_are_the_figures_by_metric():
    trial = Trial(Candidate.from_point({}), "l", "q", metrics={"latency_s": measured("latency_s", 2.0)})
    assert trial.values == {"latency_s": 2.0}
    assert trial.uid == Candidate.from_point({}).uid
