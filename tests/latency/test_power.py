"""Energy that nobody counted is a prediction: between the idle chip's and its limit's, with an interval."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cosearch.core.candidate import Candidate
from cosearch.core.errors import UserError
from cosearch.core.metric import measured, predicted
from cosearch.core.problem import Constraint, Objective, Problem
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.latency import roofline
from cosearch.latency.hlo import HloFeatures
from cosearch.latency.power import energy
from cosearch.stages import Limits, Measure, Predict, energy_source, latencies, workload_energy
from cosearch.targets import TARGETS

DECODE = OperatingPoint("decode", 1, 64)
BATCH = OperatingPoint("decode", 8, 64)
PREFILL = OperatingPoint("prefill", 2, 64, weight=3.0)
CANDIDATE = Candidate.from_point({"architecture.width": 64, "architecture.depth": 1, "architecture.head_dim": 32})


def problem(target: str, *points: OperatingPoint, attached: bool = False, reads: str = "energy_j") -> Problem:
    chip = replace(TARGETS[target].target(Path(), dict), attached=attached)
    return Problem(chip, Workload("made up", points), (Objective.parse(f"minimize {reads}"),))


def test_it_is_between_what_an_idle_chip_draws_and_its_limit():
    asked = problem("h100", DECODE)
    limit_w = asked.target.power_w
    assert limit_w is not None
    busy_s = roofline.latency_s(CANDIDATE, asked.workload, replace(asked.target, overhead_s=0.0))
    shares = []
    for latency_s in (1e4 * busy_s, 2 * busy_s, busy_s):
        latency = predicted("latency_s", latency_s, (latency_s / 2, latency_s * 3), "latency 7")
        found = energy(CANDIDATE, asked, [latency])
        assert (found.source, found.unit, found.model) == ("predicted", "J/token", "power 2; latency 7")
        assert found.interval is not None
        low, high = found.interval
        assert low < found.value < high <= latency_s * 3 * limit_w and high / low > 12
        shares.append(found.value / latency_s / limit_w)
    assert shares == sorted(shares) and 0.1 < shares[0] < 0.2 and 0.4 < shares[2] <= 1


def test_arithmetic_is_as_busy_as_what_is_multiplied():
    """A chip that multiplies int8 twice as fast is half as busy by it."""
    sizes = {"architecture.width": 512, "architecture.depth": 2, "precision.activations": "bfloat16"}
    kept = Candidate.from_point({**sizes, "precision.weights": "int8", "precision.kv_cache": "bfloat16"})
    narrow = Candidate.from_point({**kept.point, "precision.matmul_inputs": "int8"})
    asked = problem("h100", OperatingPoint("prefill", 8, 1024))
    latency = measured("latency_s", roofline.arithmetic_s(kept, asked.workload.points[0], asked.target) / 1024)
    assert energy(narrow, asked, [latency]).value < 0.8 * energy(kept, asked, [latency]).value


def test_tokens_of_a_batch_share_it_and_points_are_weighted():
    slow = measured("latency_s", 1.0)  # nothing is busy in so long a time
    one, eight, chunk = (energy(CANDIDATE, problem("a100", at), [slow]).value for at in (DECODE, BATCH, PREFILL))
    assert (eight, chunk) == (pytest.approx(one / 8, rel=1e-3), pytest.approx(one / 2, rel=1e-3))
    mixed = energy(CANDIDATE, problem("a100", DECODE, PREFILL), [slow, slow])
    assert mixed.value == pytest.approx((one + 3 * chunk) / 4)


class Answering:
    """A worker that knows the answers."""

    def __init__(self, **answers: dict[str, Any]) -> None:
        self.answers, self.asked = answers, []

    def call(self, task: str, arguments: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self.asked.append(task)
        return self.answers[task]


def test_of_a_chip_that_is_not_here_it_is_predicted_with_the_latency():
    asked, features = problem("h100", DECODE, PREFILL), HloFeatures(5, 5, 0, 5e6, 0, 0, 0)
    worker: Any = Answering(features={"features": [features.to_json()] * 2})
    source = energy_source(worker, asked, Limits())
    assert source == "predicted" and not worker.asked, "nothing here could count it"
    stage = Predict(worker, 1.0, source)
    found = stage(CANDIDATE, asked)
    assert found.keys() == stage.provides == {"latency_s", "energy_j"}
    assert {metric.source for metric in found.values()} == {"predicted"}
    assert found["latency_s"] == Predict(worker, 1.0)(CANDIDATE, asked)["latency_s"]


SAMPLES = {"samples_s": [[1e-3] * 20, [2e-3] * 20], "contended": [0.0, 0.0]}


def test_where_a_counter_is_it_is_measured():
    asked = problem("h100", BATCH, PREFILL, attached=True)
    counted = {"joules": [[1.0, 2.0], [30.0]], "steps": [[10, 15], [6]]}
    worker: Any = Answering(measure=SAMPLES, energy=counted, energy_counter={"why_uncounted": None})
    source = energy_source(worker, asked, Limits())
    assert source == "measured"
    stage = Measure(worker, 1.0, 0.1, source)
    found = stage(CANDIDATE, asked)
    assert found.keys() == stage.provides == {"latency_s", "energy_j"}
    told = found["energy_j"]
    assert told.source == "measured" and told.samples == (0.1, pytest.approx(2 / 15), 5.0)
    assert told.value == pytest.approx((3 / 25 / 8 + 3 * 5 / 128) / 4)
    assert told == workload_energy(counted["joules"], counted["steps"], asked)


def test_where_none_is_it_is_predicted_from_the_measured_latency():
    asked = problem("h100", BATCH, PREFILL, attached=True)
    worker: Any = Answering(measure=SAMPLES, energy_counter={"why_uncounted": "it is broken"})
    source = energy_source(worker, asked, Limits())
    found = Measure(worker, 1.0, 0.1, source)(CANDIDATE, asked)
    assert (found["latency_s"].source, found["energy_j"].source) == ("measured", "predicted")
    assert found["energy_j"] == energy(CANDIDATE, asked, latencies(SAMPLES["samples_s"], asked))


def test_where_it_can_be_neither_it_is_refused():
    worker: Any = Answering(energy_counter={"why_uncounted": "it is broken"})
    for attached, why in ((False, "no tpu_v5e is attached"), (True, "it is broken")):
        refused = f"energy_j can be neither measured nor predicted for target=tpu_v5e: {why}; and what it draws at most"
        with pytest.raises(UserError, match=refused):
            energy_source(worker, problem("tpu_v5e", DECODE, attached=attached), Limits())


def test_it_is_asked_for_by_objectives_and_constraints_alone():
    worker: Any = Answering(measure=SAMPLES)
    plain = problem("tpu_v5e", BATCH, PREFILL, attached=True, reads="latency_s")
    assert energy_source(worker, plain, Limits()) is None and not worker.asked
    assert Measure(worker, 1.0, 0.1)(CANDIDATE, plain).keys() == {"latency_s"} and worker.asked == ["measure"]
    for text in ("energy_j <= 2", "latency_s <= 3 * energy_j"):
        bound = replace(plain, constraints=(Constraint.parse(text),))
        with pytest.raises(UserError, match="energy_j can be neither"):
            energy_source(Answering(energy_counter={"why_uncounted": "it is broken"}), bound, Limits())  # pyright: ignore[reportArgumentType]
