"""What is said of a chip that is not here is a prediction, with an interval."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from cosearch.core.candidate import Candidate
from cosearch.core.problem import Objective, Problem
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.latency.absent import estimate
from cosearch.latency.features import work
from cosearch.latency.hlo import HloFeatures, Kernel
from cosearch.stages import Measure, Predict
from cosearch.targets import TARGETS

DECODE = OperatingPoint("decode", 1, 64)
PREFILL = OperatingPoint("prefill", 1, 64, weight=2.0)


def candidate(**schedule: str | int) -> Candidate:
    sizes = {"architecture.width": 64, "architecture.depth": 1, "architecture.head_dim": 32}
    return Candidate.from_point({**sizes, **{f"schedule.{name}": value for name, value in schedule.items()}})


def problem(target: str, *points: OperatingPoint) -> Problem:
    chip = TARGETS[target].target(Path(), dict)
    return Problem(chip, Workload("made up", points), (Objective.parse("minimize latency_s"),))


def program(launches: float, moved_bytes: float) -> HloFeatures:
    return HloFeatures((Kernel("fusion", launches, moved_bytes / launches, 0.0),), 0.0, 0.0)


def test_it_is_predicted_with_an_interval():
    found = estimate(candidate(), problem("h100", DECODE), [program(10, 1e9)])
    assert found.source == "predicted" and found.unit == "s/token" and not found.samples
    assert found.interval is not None
    low, high = found.interval
    assert low < found.value < high and high / low > 4


class Answering:
    """A worker that has compiled a program of these features."""

    def __init__(self, features: HloFeatures) -> None:
        self.features = features

    def call(self, task: str, arguments: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        assert task == "features"
        return json.loads(json.dumps({"features": [self.features.to_json()]}))


def test_the_stage_that_takes_the_place_of_measuring_predicts():
    compiled = jax.jit(lambda x: jnp.exp(x) + 1).lower(jax.ShapeDtypeStruct((1 << 20,), jnp.float32)).compile()
    worker: Any = Answering(HloFeatures.of(compiled, []))
    stage, asked = Predict(worker, 10.0), problem("tpu_v5e", DECODE)
    assert (stage.name, stage.provides) == ("predict", Measure(worker, 10.0, 1.0).provides)
    found = stage(candidate(), asked)["latency_s"]
    assert found.source == "predicted" and found.interval is not None
    assert found.value >= 2 * 4 * 2**20 / asked.target.bandwidth_bytes_per_s


def test_it_is_bytes_over_bandwidth_and_what_kernels_cost_to_start():
    asked = problem("h100", DECODE)
    chip = asked.target
    assert estimate(candidate(), asked, [program(10, 1e9)]).value == pytest.approx(
        1e9 / chip.bandwidth_bytes_per_s + 10 * chip.overhead_s
    )
    faster = replace(asked, target=replace(chip, bandwidth_bytes_per_s=1e30))
    products = work(candidate(), DECODE).flops / chip.peak_flops_per_s["float32"]
    assert estimate(candidate(), faster, [program(10, 1e9)]).value == pytest.approx(products + 10 * chip.overhead_s)


def test_it_is_a_tokens_of_one_sequence_weighted_over_the_workload():
    one, other = program(10, 1e9), program(20, 6.4e10)
    alone = [estimate(candidate(), problem("tpu_v5e", at), [of]).value for at, of in ((DECODE, one), (PREFILL, other))]
    both = estimate(candidate(), problem("tpu_v5e", DECODE, PREFILL), [one, other])
    assert both.value == pytest.approx((alone[0] + 2 * alone[1]) / 3)
    steps = estimate(candidate(steps=4), problem("tpu_v5e", DECODE), [one])
    assert steps.value == pytest.approx(alone[0] / 4)
