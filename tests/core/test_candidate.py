import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosearch.core.candidate import AXES, Candidate, Choices, as_value, canonical_json, content_hash

scalars = st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
knobs = st.builds("{}.{}".format, st.sampled_from(AXES), st.text("abcdef_", min_size=1, max_size=4))
points = st.dictionaries(knobs, scalars | st.lists(scalars, max_size=3).map(tuple), max_size=8)


@given(points, st.randoms(use_true_random=False))
def test_uid_does_not_depend_on_the_order_of_knobs(point: dict[str, Any], random: Any):
    items = list(point.items())
    random.shuffle(items)
    shuffled = Candidate.from_point(dict(items))
    assert shuffled == Candidate.from_point(point)
    assert shuffled.uid == Candidate.from_point(point).uid
    assert hash(shuffled) == hash(Candidate.from_point(point))


@given(points)
def test_point_round_trips(point: dict[str, Any]):
    candidate = Candidate.from_point(point)
    assert candidate.point == point
    assert Candidate.from_point(candidate.point).uid == candidate.uid
    assert pickle.loads(pickle.dumps(candidate)) == candidate


@given(points, points)
def test_uids_are_equal_only_for_the_same_json(one: dict[str, Any], other: dict[str, Any]):
    same = canonical_json(one) == canonical_json(other)
    assert (Candidate.from_point(one).uid == Candidate.from_point(other).uid) is same


@given(points, st.integers())
def test_quality_key_ignores_the_schedule_and_nothing_else(point: dict[str, Any], value: int):
    candidate = Candidate.from_point(point)
    for axis in AXES:
        changed = Candidate.from_point({**point, f"{axis}.a_new_knob": value})
        assert (changed.quality_axes_key == candidate.quality_axes_key) is (axis == "schedule")
        assert changed.differing_axes(candidate) == (axis,)
        assert changed.key(axis) != candidate.key(axis)


def test_lists_become_tuples_at_any_depth():
    assert as_value([1, [2, ["x"]]]) == (1, (2, ("x",)))
    assert Choices({"widths": [1, 2]})["widths"] == (1, 2)


def test_canonical_json_has_one_text_and_no_nan():
    assert canonical_json({"b": (1, 2), "a": 1.5}) == '{"a":1.5,"b":[1,2]}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))
    assert len(content_hash({})) == 16


def test_choices_are_frozen_and_ordered_by_name():
    choices = Choices({"b": 1, "a": 2})
    assert list(choices) == ["a", "b"]
    assert choices == {"a": 2, "b": 1}
    with pytest.raises(TypeError):
        choices["a"] = 3  # pyright: ignore[reportIndexIssue]
