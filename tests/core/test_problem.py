import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosearch.core.errors import UserError
from cosearch.core.problem import LOSS_LIMIT, Constraint, Objective, Problem
from cosearch.core.target import Target
from cosearch.core.workload import OperatingPoint, Workload

TARGET = Target("chip", "cpu", "made up", {"float32": 1e9}, 1e9, 10**9, 2, 1e-6)
WORKLOAD = Workload("one", (OperatingPoint("decode", 1, 16),))
REFERENCE = {"latency_s": 2.0, "bits_per_byte": 1.5, "recall_accuracy": 0.8}

positive = st.floats(1e-6, 1e6)


def problem(*constraints: str) -> Problem:
    return Problem(
        TARGET,
        WORKLOAD,
        (Objective.parse("minimize latency_s"), Objective.parse("maximize recall_accuracy")),
        tuple(map(Constraint.parse, constraints)),
    )


def test_objectives_and_constraints_are_read_and_written():
    assert Objective.parse(" minimize  latency_s ") == Objective("latency_s", "minimize")
    assert str(Objective.parse("maximize recall_accuracy")) == "maximize recall_accuracy"
    assert str(Constraint.parse("bits_per_byte<=1.02 *  reference")) == "bits_per_byte <= 1.02 *  reference"
    assert problem("bits_per_byte <= 1.02 * reference").to_json() == {
        "target": TARGET.to_json(),
        "workload": WORKLOAD.to_json(),
        "objectives": ["minimize latency_s", "maximize recall_accuracy"],
        "constraints": ["bits_per_byte <= 1.02 * reference"],
    }
    assert Target.from_json(TARGET.to_json()) == TARGET


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latency_s", "config.objectives: 'latency_s' must read 'minimize METRIC' or 'maximize METRIC'"),
        ("minimise latency_s", "must read 'minimize METRIC'"),
        (
            "minimize latency",
            "config.objectives: unknown metric 'latency'; did you mean 'latency_s'? Allowed: latency_s,",
        ),
        ("minimize", "config.objectives: unknown metric ''. Allowed: latency_s,"),
    ],
)
def test_a_wrong_objective_names_the_key_and_what_is_allowed(text: str, message: str):
    with pytest.raises(UserError) as caught:
        Objective.parse(text, "config.objectives")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latency_s < 1", "'latency_s < 1' must read 'METRIC <= EXPRESSION' or 'METRIC >= EXPRESSION'"),
        ("latency_s == 1", "must read 'METRIC <= EXPRESSION'"),
        ("latncy_s <= 1", "unknown metric 'latncy_s'; did you mean 'latency_s'? Allowed: "),
        ("latency_s <= 2 * refrence", "unknown metric 'refrence'"),
        ("latency_s <= ", "expression ''"),
        ("latency_s <= open('x')", "is not allowed"),
        ("latency_s <= 'fast'", "must read"),
        ("latency_s <= [1]", "must read"),
        ("latency_s <= 0.1 <= 0.2", "must read"),
        ("latency_s <= 'a' * reference", "'a' is not a number"),
    ],
)
def test_a_wrong_constraint_names_the_key_and_what_is_allowed(text: str, message: str):
    with pytest.raises(UserError) as caught:
        Constraint.parse(text, "config.constraints")
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.constraints: ")


@given(positive, positive)
def test_the_reference_has_loss_one_and_better_is_lower(value: float, reference: float):
    for goal, better in (("minimize", value < reference), ("maximize", value > reference)):
        objective = Objective.parse(f"{goal} latency_s")
        assert objective.loss(reference, reference) == 1.0
        if value != reference:
            assert (objective.loss(value, reference) <= 1.0) is better or math.isclose(value, reference)
    assert Objective.parse("maximize latency_s").loss(0.0, reference) == LOSS_LIMIT


@given(positive, positive)
def test_a_constraint_holds_exactly_within_its_bound(value: float, reference: float):
    values, known = {"latency_s": value}, {"latency_s": reference}
    upper, lower = Constraint.parse("latency_s <= 1.5 * reference"), Constraint.parse("latency_s >= 1.5 * reference")
    assert (upper.excess(values, known) == 0) is (value <= 1.5 * reference)
    assert (lower.excess(values, known) == 0) is (value >= 1.5 * reference)
    assert upper.excess(values, known) >= 0
    assert upper.excess({"latency_s": 2 * value}, known) >= upper.excess(values, known)


def test_excess_is_the_broken_part_relative_to_the_bound():
    limits = problem("latency_s <= 0.5 * reference", "bits_per_byte <= 2", "recall_accuracy >= 1.6 * latency_s")
    assert limits.excess({"latency_s": 0.5, "bits_per_byte": 2.0, "recall_accuracy": 0.8}, REFERENCE) == 0
    assert limits.excess({"latency_s": 1.5, "bits_per_byte": 2.0, "recall_accuracy": 2.4}, REFERENCE) == pytest.approx(
        0.5
    )
    assert limits.excess({"latency_s": 1.5, "bits_per_byte": 3.0, "recall_accuracy": 2.4}, REFERENCE) == pytest.approx(
        1.0
    )


def test_what_is_missing_breaks_a_constraint_for_good():
    own, relative = problem("bits_per_byte <= 2"), problem("bits_per_byte <= 2 * reference")
    other = problem("latency_s <= bits_per_byte")
    assert own.excess({}, REFERENCE) == math.inf
    assert own.excess({"bits_per_byte": 1.0}, {}) == 0
    assert (
        relative.excess({"bits_per_byte": 1.0}, {})
        == relative.excess({"bits_per_byte": 1.0}, {"latency_s": 1.0})
        == math.inf
    )
    assert relative.constraints[0].reads == {"bits_per_byte"}
    assert other.constraints[0].reads == {"latency_s", "bits_per_byte"}
    assert other.excess({"latency_s": 1.0}, REFERENCE) == math.inf


def test_a_constraint_holds_elementwise_of_arrays():
    limit = Constraint.parse("bits_per_byte <= 1.1 * reference + 0.0 * latency_s")
    values = {"bits_per_byte": np.array([1.0, 1.6, 1.7]), "latency_s": np.array([1.0, 2.0, 3.0])}
    assert limit.holds(values, REFERENCE).tolist() == [True, True, False]
    assert Constraint.parse("bits_per_byte >= 1.2").holds(values, {}).tolist() == [False, True, True]
    assert limit.holds({"bits_per_byte": 1.0, "latency_s": 1.0}, REFERENCE)


def test_losses_need_every_objective_of_the_trial_and_of_the_reference():
    values = {"latency_s": 1.0, "recall_accuracy": 0.4}
    assert problem().losses(values, REFERENCE) == pytest.approx([0.5, 1.5])
    assert problem().losses({"latency_s": 1.0}, REFERENCE) is None
    assert problem().losses(values, {}) is None
    assert problem().losses(values, {"latency_s": 2.0}) is None
    assert problem().losses(values | {"latency_s": math.inf}, REFERENCE) is None
    assert problem().losses(values, REFERENCE | {"recall_accuracy": 0.0}) is None
