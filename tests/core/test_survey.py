"""The count of a space's distinct points is exact, and what is drawn of them tells the legal ones without bias."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosearch.core.candidate import Candidate, Value
from cosearch.core.errors import UserError
from cosearch.core.expression import Expression
from cosearch.core.space import Rule, Space
from cosearch.core.survey import DistinctPoints, Survey
from tests.core.test_space import legal, spaces


def lopsided() -> Space:
    """Of 20 variants one reads six knobs: it is 1 of 20 raw points and 4,096 of 4,115 distinct ones."""
    knobs: dict[str, tuple[Value, ...]] = {f"schedule.k{index}": (0, 1, 2, 3) for index in range(6)}
    return Space(
        "lopsided",
        {"architecture.attention": tuple(range(20)), **knobs},
        dict.fromkeys(knobs, Expression("architecture.attention == 7")),
        (Rule.require("few", Expression("schedule.k0 + schedule.k1 <= 3"), "they are too many"),),
    )


@given(spaces(), st.randoms(use_true_random=False))
def test_the_distinct_points_of_any_space_are_counted_and_drawn(space: Space, rng: random.Random):
    distinct = {Candidate.from_point(space.canonical(raw)).uid for raw in space.points()}
    points = DistinctPoints(space)
    assert points.count == len(distinct)
    for _ in range(10):
        point = points.draw(rng)
        assert space.canonical(point) == point
        assert Candidate.from_point(point).uid in distinct


def test_every_distinct_point_is_drawn_alike():
    space = Space(
        "small",
        {
            "architecture.attention": ("mha", ("gqa", "mqa"), "gqa"),
            "architecture.kv_heads": (1, 2, 4),
            "schedule.block": (16, 32),
        },
        {
            "architecture.kv_heads": Expression("'gqa' in architecture.attention"),
            "schedule.block": Expression("architecture.kv_heads == 4"),
        },
    )
    points, rng = DistinctPoints(space), random.Random(0)
    # mha: 1; either of the two others: kv_heads 1, kv_heads 2, and kv_heads 4 by two blocks.
    assert points.count == 1 + 2 * 4
    drawn = Counter(Candidate.from_point(points.draw(rng)).uid for _ in range(9_000))
    assert len(drawn) == 9
    assert all(850 <= count <= 1_150 for count in drawn.values())


def test_conditions_that_no_knob_links_are_counted_each_on_its_own():
    gates: dict[str, tuple[Value, ...]] = {f"schedule.gate{index}": tuple(range(10)) for index in range(30)}
    gated: dict[str, tuple[Value, ...]] = {f"schedule.own{index}": tuple(range(3)) for index in range(30)}
    when = {f"schedule.own{index}": Expression(f"schedule.gate{index} == 4") for index in range(30)}
    assert DistinctPoints(Space("vast", gates | gated, when)).count == (9 + 3) ** 30


def test_conditions_that_link_too_many_values_are_refused_by_name():
    knobs: dict[str, tuple[Value, ...]] = {f"schedule.k{index}": tuple(range(10)) for index in range(7)}
    when = {"schedule.own": Expression(" + ".join(knobs) + " > 9")}
    with pytest.raises(UserError) as caught:
        DistinctPoints(Space("linked", {**knobs, "schedule.own": (1, 2)}, when))
    assert str(caught.value) == (
        "the space 'linked': its conditions ('when') link schedule.k0, schedule.k1, schedule.k2, schedule.k3, "
        "schedule.k4, schedule.k5, schedule.k6, whose values make 10,000,000 combinations; "
        "up to 1,000,000 can be counted"
    )


def test_a_knob_whose_condition_names_what_is_not_there_is_never_active():
    space = Space(
        "s", {"schedule.block": (1, 2), "schedule.fuse": (0, 1)}, {"schedule.fuse": Expression("schedule.no")}
    )
    assert DistinctPoints(space).count == 2


def test_a_survey_counts_what_it_draws_by_the_rules():
    space, rng = lopsided(), random.Random(0)
    survey = Survey(space)
    for _ in range(400):
        survey.draw(rng)
    assert survey.points.count == 19 + 4**6
    assert survey.legal + survey.refusals.total == survey.drawn == 400
    assert set(survey.refusals.counts) == {"few"}
    low, high = survey.share()
    assert 0 < low < survey.legal / survey.drawn < high < 1
    assert survey.example in legal(space)


def test_nine_intervals_of_ten_hold_the_count_where_candidates_are_of_very_unequal_numbers_of_raw_points():
    space = lopsided()
    share = len(legal(space)) / (19 + 4**6)
    held = 0
    for seed in range(200):
        survey, rng = Survey(space), random.Random(seed)
        for _ in range(100):
            survey.draw(rng)
        low, high = survey.share()
        held += low <= share <= high
    assert 165 <= held <= 195


def test_none_legal_of_those_drawn_does_not_say_that_there_are_none():
    rng, never = random.Random(0), Rule("never", lambda point: "no")
    survey = Survey(Space("hopeless", {"schedule.block": (1, 2)}, rules=(never,)))
    for _ in range(50):
        survey.draw(rng)
    low, high = survey.share()
    assert low == 0 < high < 0.1
    assert survey.example is None
