"""The surrogate, on a problem whose figures are a formula: nothing is compiled or trained."""

from dataclasses import replace

import numpy as np
import pytest

from cosearch.core import pareto
from cosearch.core.candidate import Candidate
from cosearch.core.metric import measured
from cosearch.core.problem import Problem
from cosearch.core.space import Space
from cosearch.core.trial import Failure, Proposer, Trial
from cosearch.latency import roofline
from cosearch.proposers import PROPOSERS, Setting
from cosearch.proposers.surrogate import SurrogateProposer
from cosearch.testing import small_problem, small_space

KNOBS = {
    "architecture.width": [96, 32, 64, 128, 160],
    "architecture.depth": [2, 1, 3],
    "architecture.head_dim": [16],
    "architecture.ffn_ratio": [2, 1, 3],
    "precision.weights": ["float32", "bfloat16", "int8"],
    "schedule.matmul": ["dot", "multiply_reduce"],
    "schedule.weight_layout": ["in_out", "out_in"],
    "schedule.cache_layout": ["bshd", "bhsd", "bhds"],
}
OPTIONS = {"pool": 150, "design": 8, "architectures": 4}


@pytest.fixture(scope="module")
def space() -> Space:
    return small_space(KNOBS)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return small_problem()


def trial(candidate: Candidate, problem: Problem) -> Trial:
    """Slow as the roofline and the schedule say; good as the size says, int8 a little worse."""
    weights, schedule, sizes = candidate.precision["weights"], candidate.schedule, candidate.architecture
    width, depth, ratio = sizes["width"], sizes["depth"], sizes["ffn_ratio"]
    assert isinstance(width, int) and isinstance(depth, int) and isinstance(ratio, int)
    slow = 1.0 if schedule["matmul"] == "multiply_reduce" else (4.0 if weights == "int8" else 1.5)
    slow *= 2.0 if schedule["weight_layout"] == "out_in" else 1.0
    slow *= {"bshd": 1.0, "bhsd": 1.2, "bhds": 1.4}[str(schedule["cache_layout"])]
    bits = 8.0 * (width * depth**0.5 * (1 + ratio)) ** -0.2 * (1.01 if weights == "int8" else 1.0)
    metrics = {
        "latency_s": measured("latency_s", slow * roofline.latency_s(candidate, problem.workload, problem.target)),
        "bits_per_byte": measured("bits_per_byte", bits),
        "recall_accuracy": measured("recall_accuracy", 0.8),
    }
    return Trial(
        candidate,
        latency_key=candidate.uid,
        quality_key=candidate.quality_axes_key,
        metrics=metrics,
        seconds={"measure": 1.0, "quality": 1.0},
    )


def search(name: str, space: Space, problem: Problem, seed: int, trials: int) -> list[Trial]:
    options = OPTIONS if name == "surrogate" else {}
    proposer: Proposer = PROPOSERS[name](Setting(space, problem, seed, options))
    done = [trial(space.reference, problem)]
    proposer.tell(done)
    while len(done) < trials:
        found = [trial(candidate, problem) for candidate in proposer.ask(min(4, trials - len(done)))]
        assert found
        proposer.tell(found)
        done += found
    return done


def hypervolume(trials: list[Trial], problem: Problem) -> float:
    return pareto.hypervolume(np.array([problem.losses(one.values, trials[0].values) for one in trials]))


def test_it_finds_more_than_random_search_in_as_many_trials(space: Space, problem: Problem):
    found = {
        name: [hypervolume(search(name, space, problem, seed, 24), problem) for seed in range(3)]
        for name in ("random", "surrogate")
    }
    assert np.mean(found["surrogate"]) > np.mean(found["random"])


def test_the_first_candidates_are_of_few_architectures(space: Space, problem: Problem):
    for seed in range(3):
        proposer = PROPOSERS["surrogate"](Setting(space, problem, seed, OPTIONS))
        design = list(proposer.ask(100))
        assert len(design) == OPTIONS["design"]
        architectures = {candidate.key("architecture") for candidate in design}
        assert 1 < len(architectures) <= OPTIONS["architectures"]
        assert len({candidate.key("precision", "schedule") for candidate in design}) > len(architectures)


def test_it_predicts_once_it_has_learnt(space: Space, problem: Problem):
    proposer = SurrogateProposer(Setting(space, problem, 0, OPTIONS))
    assert proposer.predict(space.reference) == {}
    proposer.tell([trial(space.reference, problem), *[trial(one, problem) for one in proposer.ask(8)]])
    metrics = proposer.predict(space.reference)
    assert {"latency_s", "bits_per_byte"} <= metrics.keys()
    for name, metric in metrics.items():
        assert metric.source == "predicted"
        assert metric.interval is not None
        assert metric.interval[0] <= metric.value < metric.interval[1]  # memory is never less than what is stored
        assert not name.endswith("_s") or ("fitted to 9 trials" in metric.model and metric.interval[0] < metric.value)


def test_failures_alone_do_not_stop_it(space: Space, problem: Problem):
    proposer = PROPOSERS["surrogate"](Setting(space, problem, 1, OPTIONS))
    proposer.tell([trial(space.reference, problem)])
    for _ in range(4):
        asked = proposer.ask(4)
        assert asked
        proposer.tell(
            [
                Trial(one, one.uid, one.quality_axes_key, failure=Failure("compile", "no"), seconds={"compile": 1.0})
                for one in asked
            ]
        )


def test_it_proposes_what_the_space_offers_though_the_reference_is_outside(space: Space, problem: Problem):
    offered = {"architecture.width": (32, 160), "precision.weights": ("int8", "bfloat16")}
    narrow = replace(space, knobs={**space.knobs, **offered})
    assert (narrow.reference.architecture["width"], narrow.reference.precision["weights"]) == (96, "float32")
    for one in search("surrogate", narrow, problem, 0, 20)[1:]:
        assert one.candidate.architecture["width"] in (32, 160), one.candidate.point
        assert one.candidate.precision["weights"] in ("int8", "bfloat16"), one.candidate.point


@pytest.mark.parametrize("asked", [4, 16])
def test_an_ask_has_one_candidate_of_an_architecture_and_one_training(space: Space, problem: Problem, asked: int):
    proposer = PROPOSERS["surrogate"](Setting(space, problem, 0, OPTIONS))
    done = [trial(space.reference, problem), *[trial(one, problem) for one in proposer.ask(OPTIONS["design"])]]
    proposer.tell(done)
    new = 0
    for _ in range(6):
        trained = {one.candidate.key("architecture") for one in done}
        found = [trial(candidate, problem) for candidate in proposer.ask(asked)]
        asked_for = {one.candidate.key("architecture") for one in found}
        assert len(asked_for) == len(found) > 0 and len(asked_for - trained) <= 1
        new += len({one.candidate.key("architecture") for one in found} - trained)
        proposer.tell(found)
        done += found
    assert new > 0
