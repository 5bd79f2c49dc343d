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
from cosearch.core.metric import Metric
from cosearch.core.problem import Objective, Problem
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.latency import absent, roofline
from cosearch.latency.calibration import Calibration, Shot, choose, path_of, subjects
from cosearch.latency.features import work
from cosearch.latency.hlo import HloFeatures
from cosearch.latency.tables import Operations
from cosearch.stages import Measure, Predict, over_workload
from cosearch.targets import TARGETS

DECODE = OperatingPoint("decode", 1, 64)
PREFILL = OperatingPoint("prefill", 1, 64, weight=2.0)


def candidate(**schedule: str | int) -> Candidate:
    sizes = {"architecture.width": 64, "architecture.depth": 1, "architecture.head_dim": 32}
    return Candidate.from_point({**sizes, **{f"schedule.{name}": value for name, value in schedule.items()}})


def problem(target: str, *points: OperatingPoint) -> Problem:
    chip = TARGETS[target].target(Path(), dict)
    return Problem(chip, Workload("made up", points), (Objective.parse("minimize latency_s"),))


def estimate(candidate: Candidate, asked: Problem, hlo: list[HloFeatures]) -> Metric:
    return over_workload(absent.estimate(candidate, asked, hlo), asked)


def program(launches: float, moved_bytes: float) -> HloFeatures:
    return HloFeatures(launches, launches, 0, moved_bytes, 0, 0, 0)


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


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COSEARCH_CACHE", str(tmp_path))
    absent._models.cache_clear()
    yield
    absent._models.cache_clear()


def calibrate(target: str, kind: str, slower: float, count: int = 10) -> None:
    """Keep a calibration by operations of one kind, which took so many times as long as was expected."""
    [subject] = [one for one in subjects(problem(target, DECODE).target) if one.kind == kind]
    chosen, _ = choose(subject, count, 0, 0)
    slow = slower * np.exp(subject.function(chosen).mean)
    rows = [{name: values[row].item() for name, values in chosen.columns.items()} for row in range(len(chosen))]
    shots = tuple(Shot(kind, one, float(s), [float(s)]) for one, s in zip(rows, slow, strict=True))
    Calibration(target, {}, shots, ()).save(path_of(target))
    absent._models.cache_clear()


def test_on_gpus_operations_take_what_tables_taught(own_cache):
    """Reading tiny matrices at the bandwidth of an H100 takes less than starting to."""
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


def width(found: Metric) -> float:
    assert found.interval is not None
    return found.interval[1] / found.interval[0]


def test_a_calibration_narrows_the_interval_and_moves_the_figure(own_cache):
    given = problem("h100", DECODE)
    before = estimate(on_gpu(), given, [program(10, 1e6)])
    calibrate("h100", "gemm", slower=3)
    after = estimate(on_gpu(), given, [program(10, 1e6)])
    assert after.value > 1.5 * before.value
    assert width(after) < width(before)
    assert "calibrated by 10 operations" in after.model


def test_of_operations_of_other_kinds_a_calibration_makes_nothing_surer(own_cache):
    given = problem("h100", DECODE)
    before = estimate(on_gpu(), given, [program(10, 1e6)])
    calibrate("h100", "attn_context", slower=3)
    after = estimate(on_gpu(), given, [program(10, 1e6)])
    assert (after.value, width(after)) == (before.value, pytest.approx(width(before)))


@pytest.mark.parametrize(("kind", "decode", "prefill"), [("attn_generation", 1, 0), ("attn_context", 0, 1)])
def test_prompts_are_read_as_prompts(own_cache, kind: str, decode: int, prefill: int):
    points = OperatingPoint("decode", 4, 1024), OperatingPoint("prefill", 4, 1024)
    asked, programs = problem("h100", *points), [program(10, 1e6)] * 2
    before = absent.estimate(on_gpu(), asked, programs)
    calibrate("h100", kind, slower=20)
    after = absent.estimate(on_gpu(), asked, programs)
    slower = [later.value > 1.5 * first.value for first, later in zip(before, after, strict=True)]
    assert slower == [decode, prefill]


def test_prompts_that_do_not_see_all_are_in_no_table(own_cache):
    windowed = {"architecture.attention": "sliding_window", "architecture.window": 64}
    short = Candidate.from_point({**on_gpu().point, **windowed})
    asked = problem("h100", OperatingPoint("prefill", 1, 1024))
    before = estimate(short, asked, [program(10, 1e6)])
    calibrate("h100", "attn_context", slower=20)
    assert estimate(short, asked, [program(10, 1e6)]).value == before.value


def test_another_calibration_is_another_model(own_cache):
    target = problem("h100", DECODE).target
    told = {absent.model(target)}
    for slower in (2, 3):
        calibrate("h100", "gemm", slower)
        told.add(absent.model(target))
        assert estimate(on_gpu(), problem("h100", DECODE), [program(10, 1e6)]).model == absent.model(target)
    assert len(told) == 3


def test_products_take_as_long_as_what_is_multiplied():
    """Rounded to int8, an H100 multiplies twice as many numbers as in bfloat16, and an A100 no float8 at all."""
    prompt = OperatingPoint("prefill", 1, 1024)
    kept = on_gpu(weights="int8", kv_cache="int8")  # of which no table tells
    narrow = Candidate.from_point({**kept.point, "precision.matmul_inputs": "int8"})
    for name in ("h100", "tpu_v5e"):
        chip = problem(name, prompt).target
        times = [roofline.arithmetic_s(one, prompt, chip) for one in (narrow, kept)]
        fast = replace(problem(name, prompt), target=replace(chip, bandwidth_bytes_per_s=1e30, overhead_s=1e-30))
        told = [1024 * estimate(one, fast, [program(1, 1.0)]).value for one in (narrow, kept)]
        assert told == pytest.approx(times)
        assert times[0] < 0.7 * times[1]
    emulated, kept = on_gpu(weights="float8_e4m3", matmul_inputs="float8_e4m3"), on_gpu(weights="float8_e4m3")
    chip = problem("a100", prompt).target
    assert roofline.arithmetic_s(emulated, prompt, chip) == roofline.arithmetic_s(kept, prompt, chip)
    assert roofline.peak_flops_per_s(chip, "float64") == chip.peak_flops_per_s["float32"], "the slowest that it tells"
