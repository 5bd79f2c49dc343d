"""What is said of a chip that is not here is a prediction, with an interval."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosearch.core.candidate import Candidate
from cosearch.core.problem import Objective, Problem
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.latency import absent
from cosearch.latency.absent import estimate
from cosearch.latency.calibration import Calibration, Shot, choose, path_of, subjects
from cosearch.latency.features import work
from cosearch.latency.hlo import HloFeatures, Kernel
from cosearch.latency.tables import Operations
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


def on_gpu(**precision: str) -> Candidate:
    sizes = {"architecture.width": 512, "architecture.depth": 2, "architecture.head_dim": 64}
    formats = {"precision.activations": "bfloat16", "precision.weights": "bfloat16", "precision.kv_cache": "bfloat16"}
    return Candidate.from_point(
        {**sizes, **formats, **{f"precision.{name}": value for name, value in precision.items()}}
    )


def test_on_gpus_operations_take_what_tables_taught(tmp_path, monkeypatch):
    """Reading tiny matrices at the bandwidth of an H100 takes less than starting to."""
    monkeypatch.setenv("COSEARCH_CACHE", str(tmp_path))
    absent._models.cache_clear()
    known, unknown = on_gpu(), on_gpu(weights="int8")
    given = program(10, 1e6)
    learnt, roofline = (estimate(one, problem("h100", DECODE), [given]).value for one in (known, unknown))
    assert learnt > 1.2 * roofline
    found = estimate(known, problem("h100", DECODE), [given])
    assert "gemm" in found.model and "not calibrated" in found.model


def test_of_operations_unlike_those_in_the_tables_nothing_is_said():
    [gemm] = [one for one in subjects(problem("h100", DECODE).target) if one.kind == "gemm"]
    sizes = {"dtype": ["bfloat16"] * 2, "m": [1, 1], "n": [4096, 2**22], "k": [4096, 2**22]}
    told = Operations("gemm", {name: np.array(values) for name, values in sizes.items()})
    assert gemm.knows(told).tolist() == [True, False]


def test_a_calibration_narrows_the_interval_and_moves_the_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("COSEARCH_CACHE", str(tmp_path))
    absent._models.cache_clear()
    given = problem("h100", DECODE)
    before = estimate(on_gpu(), given, [program(10, 1e6)])
    [subject] = [one for one in subjects(given.target) if one.kind == "gemm"]
    chosen, _ = choose(subject, 10, 0, 0)
    slow = 3 * np.exp(subject.function(chosen).mean)
    rows = [{name: values[row].item() for name, values in chosen.columns.items()} for row in range(len(chosen))]
    shots = tuple(Shot("gemm", one, float(s), [float(s)]) for one, s in zip(rows, slow, strict=True))
    Calibration("h100", {}, shots, ()).save(path_of("h100"))
    absent._models.cache_clear()
    after = estimate(on_gpu(), given, [program(10, 1e6)])
    absent._models.cache_clear()
    assert after.value > 1.5 * before.value
    assert before.interval is not None and after.interval is not None
    assert after.interval[1] / after.interval[0] < before.interval[1] / before.interval[0]
    assert "calibrated by 10 operations" in after.model
