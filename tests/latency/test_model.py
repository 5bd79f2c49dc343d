"""The models of a run, on figures that are made up from a rule, so that what they should learn is known."""

import random
from dataclasses import replace

import numpy as np
import pytest

from cosearch import axes
from cosearch.core.candidate import Candidate
from cosearch.core.errors import Rejected
from cosearch.core.metric import measured
from cosearch.core.problem import Objective, Problem
from cosearch.core.space import Space
from cosearch.core.trial import Trial
from cosearch.latency import roofline
from cosearch.latency.features import work
from cosearch.latency.model import LatencyModel
from cosearch.latency.network import RateNetwork
from cosearch.testing import small_problem, small_space

KNOBS = {
    "architecture.width": [64, 32, 96, 128],
    "architecture.depth": [2, 1, 3],
    "architecture.head_dim": [16],
    "architecture.attention": ["mha", "mqa"],
    "precision.weights": ["float32", "bfloat16", "int8"],
    "schedule.matmul": ["dot", "multiply_reduce"],
    "schedule.weight_layout": ["in_out", "out_in"],
    "schedule.cache_layout": ["bshd", "bhds"],
}


@pytest.fixture(scope="module")
def space() -> Space:
    return small_space(KNOBS)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return small_problem()


def true_latency_s(candidate: Candidate, problem: Problem) -> float:
    """The roofline times a factor that the knobs decide together."""
    schedule, weights = candidate.schedule, candidate.precision["weights"]
    factor = 1.5
    if weights == "int8":
        factor *= 0.8 if schedule["matmul"] == "multiply_reduce" else 6.0
    if schedule.get("weight_layout") == "out_in" and schedule["matmul"] == "dot":
        factor *= 2.5
    return factor * roofline.latency_s(candidate, problem.workload, problem.target)


def drawn(space: Space, count: int, seed: int) -> list[Candidate]:
    rng = random.Random(seed)
    found: dict[str, Candidate] = {}
    while len(found) < count:
        candidate = space.sample(rng)
        found[candidate.uid] = candidate
    return list(found.values())


def trial(candidate: Candidate, problem: Problem, noise: float = 1.0) -> Trial:
    metrics = {"latency_s": measured("latency_s", noise * true_latency_s(candidate, problem))}
    return Trial(candidate, latency_key=candidate.uid, quality_key=candidate.quality_axes_key, metrics=metrics)


def test_before_it_has_learnt_it_predicts_about_the_roofline(space: Space, problem: Problem):
    candidates = drawn(space, 5, 0)
    predictions = LatencyModel(space, problem, RateNetwork.untrained()).predict(candidates)
    floors = [roofline.latency_s(candidate, problem.workload, problem.target) for candidate in candidates]
    ratio = predictions["latency_s"].quantile(0.0) / floors
    assert (ratio > 0.5).all() and (ratio < 4).all()
    [point] = problem.workload.points
    stored = [done.weight_bytes + done.cache_bytes for done in (work(one, point) for one in candidates)]
    np.testing.assert_allclose(predictions["memory_bytes"].quantile(0.0), stored)
    np.testing.assert_allclose(predictions["memory_bytes"].quantile(-9.0), stored)  # never less than what is stored
    assert (predictions["latency_s"].quantile(1.0) > 2 * np.array(floors)).all()


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_there_is_a_start_on_every_platform(space: Space, problem: Problem, platform: str):
    elsewhere = replace(problem, target=replace(problem.target, platform=platform))
    latency = LatencyModel(space, elsewhere).predict([space.reference])["latency_s"].quantile(0.0)[0]
    assert np.isfinite(latency)
    assert latency > 0


def test_it_starts_from_the_processor_that_it_knows_and_goes_on_from_the_one_that_fits(space: Space, problem: Problem):
    learnt, candidates = RateNetwork.load("cpu"), drawn(space, 30, 7)
    assert len(learnt.processors) == 2
    first = {}
    for name in learnt.processors:
        here = replace(problem, target=replace(problem.target, source=f"measured on {name}, 2 cores"))
        first[name] = LatencyModel(space, here, learnt).predict(candidates)["latency_s"].quantile(0.0)
    one, other = first.values()
    assert not np.allclose(one, other, rtol=0.02)
    for name, truth in first.items():  # whatever a target says that it is
        metrics = [{"latency_s": measured("latency_s", value)} for value in truth[:24]]
        trials = [Trial(c, c.uid, c.quality_axes_key, metrics=m) for c, m in zip(candidates[:24], metrics, strict=True)]
        model = LatencyModel(space, problem, learnt)
        model.fit(trials)
        np.testing.assert_allclose(
            model.predict(candidates[24:])["latency_s"].quantile(0.0), truth[24:], rtol=0.05, err_msg=name
        )


def test_a_prediction_says_which_model_and_data_it_is_of(space: Space, problem: Problem):
    candidates = drawn(space, 12, 5)
    model = LatencyModel(space, problem)
    names = []
    for seen in (candidates[:6], candidates[:6], candidates[:8]):
        model.fit([trial(one, problem) for one in seen])
        names.append(model.predict(candidates)["latency_s"].model)
    assert names[0] == names[1] != names[2]
    assert "6 trials" in names[0] and "8 trials" in names[2]


def test_a_prediction_names_the_trials_that_had_its_own_metric(space: Space, problem: Problem):
    candidates = drawn(space, 9, 5)
    trials = []
    for index, one in enumerate(candidates):
        done = trial(one, problem)
        memory = {"memory_bytes": measured("memory_bytes", 1e6)}
        trials.append(replace(done, metrics={**memory, **(done.metrics if index < 6 else {})}))
    model = LatencyModel(space, problem)
    model.fit(trials)
    said = {name: prediction.model for name, prediction in model.predict(candidates).items()}
    assert "fitted to 6 trials" in said["latency_s"] and "fitted to 9 trials" in said["memory_bytes"]


def can_be_built(candidate: Candidate) -> bool:
    try:
        axes.served_shape(candidate)
    except Rejected:
        return False
    return True


@pytest.mark.parametrize("fitted", [0, 30])
def test_a_row_that_is_not_legal_is_never_the_fastest(problem: Problem, fitted: int):
    space = axes.load_space("llm_decode_full", target="cpu")
    model, candidates = LatencyModel(space, problem), drawn(space, 40, 7)
    model.fit([trial(one, problem) for one in candidates[:fitted]])
    rows = model.encoding.rows(candidates)
    shuffled = np.random.default_rng(0).permuted(rows, axis=0)
    built = [can_be_built(model.encoding.candidate(row)) for row in shuffled]
    assert not all(built)
    with np.errstate(all="raise"):
        predictions = model.predict_rows(np.vstack([rows, shuffled]))
    for prediction in predictions.values():
        np.testing.assert_array_equal(np.isfinite(prediction.quantile(0.0)), [True] * 40 + built)


def test_what_the_space_does_not_offer_is_refused_with_a_reason(space: Space, problem: Problem):
    model = LatencyModel(space, problem)
    other = Candidate.from_point({**space.reference.point, "architecture.width": 4096})
    assert "architecture.width=4096" in str(model.why_not(other))
    with pytest.raises(Rejected, match="4096"):
        model.predict([other])


def test_the_roofline_is_never_below_bytes_over_bandwidth(space: Space, problem: Problem):
    [point] = problem.workload.points
    for candidate in drawn(space, 10, 1):
        done = work(candidate, point)
        floor = roofline.floor_s(done, problem.target)
        assert floor >= (done.weight_bytes + done.cache_bytes) / problem.target.bandwidth_bytes_per_s
        assert roofline.latency_s(candidate, problem.workload, problem.target) > floor


def test_it_learns_what_the_knobs_do_and_how_sure_it_is(space: Space, problem: Problem):
    rng = np.random.default_rng(2)
    candidates = drawn(space, 120, 3)
    seen, held_out = candidates[:60], candidates[60:]
    model = LatencyModel(space, problem)
    model.fit([trial(one, problem, float(np.exp(0.03 * rng.standard_normal()))) for one in seen])
    prediction = model.predict(held_out)["latency_s"]
    truth = np.array([true_latency_s(one, problem) for one in held_out])
    error = np.abs(prediction.quantile(0.0) / truth - 1)
    assert np.median(error) < 0.15
    inside = (prediction.quantile(-1.645) <= truth) & (truth <= prediction.quantile(1.645))
    assert 0.75 <= inside.mean() <= 1.0


def test_energy_is_learnt_where_the_problem_reads_it(space: Space, problem: Problem):
    watts, candidates = 37.0, drawn(space, 60, 6)
    asked = replace(problem, objectives=(*problem.objectives, Objective.parse("minimize energy_j")))
    trials = []
    for one in candidates[:40]:
        done = trial(one, problem)
        energy = measured("energy_j", watts * done.metrics["latency_s"].value)
        trials.append(replace(done, metrics={**done.metrics, "energy_j": energy}))
    model, plain = LatencyModel(space, asked), LatencyModel(space, problem)
    for each in (model, plain):
        each.fit(trials)
    assert "energy_j" not in plain.predict(candidates)
    found = model.predict(candidates[40:])["energy_j"].quantile(0.0)
    truth = np.array([watts * true_latency_s(one, problem) for one in candidates[40:]])
    assert np.median(np.abs(found / truth - 1)) < 0.2


def test_too_few_trials_teach_nothing(space: Space, problem: Problem):
    candidates = drawn(space, 6, 4)
    model = LatencyModel(space, problem)
    before = model.predict(candidates)["latency_s"]
    model.fit([trial(one, problem) for one in candidates[:3]])
    np.testing.assert_array_equal(model.predict(candidates)["latency_s"].mean, before.mean)
