import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosearch.core.errors import UserError
from cosearch.core.workload import OperatingPoint, Workload

operating_points = st.builds(
    OperatingPoint,
    st.sampled_from(["decode", "prefill"]),
    st.integers(1, 512),
    st.integers(1, 10**6),
    st.floats(1e-6, 1e6),
)
workloads = st.builds(Workload, st.text(max_size=9), st.lists(operating_points, min_size=1, max_size=5).map(tuple))


@given(workloads)
def test_round_trips_through_json(workload: Workload):
    assert Workload.from_json(json.loads(json.dumps(workload.to_json()))) == workload


@given(workloads)
def test_context_and_batch_are_the_largest(workload: Workload):
    assert all(point.batch <= workload.batch and point.context <= workload.context for point in workload.points)
    assert workload.batch in [point.batch for point in workload.points]


def test_tokens_of_a_run():
    assert OperatingPoint("decode", 8, 1024).tokens == 8
    assert OperatingPoint("prefill", 8, 1024).tokens == 8 * 1024


GOOD = {"phase": "decode", "batch": 1, "context": 16}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "w", "points": []}, "w.yaml: 'points' is empty"),
        ({"name": "w"}, "w.yaml: 'points' is empty"),
        ({"points": [GOOD]}, "w.yaml.name: None is not a name"),
        ({"name": "w", "points": [GOOD], "extra": 1}, "w.yaml: unknown key 'extra'. Allowed: name, points"),
        ({"name": "w", "points": "decode"}, "w.yaml.points: 'decode' is not a list"),
        ({"name": "w", "points": [3]}, r"w.yaml.points\[0\]: 3 is not a mapping"),
        (
            {"name": "w", "points": [GOOD, GOOD | {"contxt": 1}]},
            r"w.yaml.points\[1\]: unknown key 'contxt'. Allowed: phase, batch, context, weight",
        ),
        (
            {"name": "w", "points": [GOOD | {"phase": "train"}]},
            r"w.yaml.points\[0\].phase: 'train' is unknown. Allowed: decode, prefill",
        ),
        ({"name": "w", "points": [{"batch": 1, "context": 1}]}, r"points\[0\].phase: None is unknown"),
        ({"name": "w", "points": [GOOD | {"batch": 0}]}, r"points\[0\].batch: 0 is not a whole number of at least 1"),
        ({"name": "w", "points": [GOOD | {"batch": True}]}, r"points\[0\].batch: True is not a whole number"),
        ({"name": "w", "points": [GOOD | {"batch": 1.5}]}, r"points\[0\].batch: 1.5 is not a whole number"),
        ({"name": "w", "points": [GOOD | {"context": "4k"}]}, r"points\[0\].context: '4k' is not a whole number"),
        ({"name": "w", "points": [GOOD | {"context": None}]}, r"points\[0\].context: None is not a whole number"),
        ({"name": "w", "points": [GOOD | {"weight": 0}]}, r"points\[0\].weight: 0 is not a number above 0"),
        ({"name": "w", "points": [GOOD | {"weight": -1.0}]}, r"points\[0\].weight: -1.0 is not a number above 0"),
        ({"name": "w", "points": [GOOD | {"weight": float("nan")}]}, r"points\[0\].weight: nan is not"),
        ({"name": "w", "points": [GOOD | {"weight": float("inf")}]}, r"points\[0\].weight: inf is not"),
        ({"name": "w", "points": [GOOD | {"weight": "1"}]}, r"points\[0\].weight: '1' is not"),
    ],
)
def test_errors_name_file_key_and_what_is_allowed(data: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        Workload.from_json(data, "w.yaml")
