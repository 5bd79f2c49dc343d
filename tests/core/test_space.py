import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cosearch.core.candidate import Candidate, Value
from cosearch.core.errors import UserError
from cosearch.core.expression import Expression
from cosearch.core.space import Knob, Refusals, Rule, Space, choice, fraction, integer, read_yaml, whole_part

DECLARED: dict[str, Knob] = {
    "architecture.attention": choice("mha", lambda: ("mha", "gqa", "window"), per_layer=True),
    "architecture.heads": integer(8),
    "architecture.kv_heads": integer(8, used_by=("architecture.attention", ("gqa",))),
    "architecture.window": integer(64, at_least=16, used_by=("architecture.attention", ("window",))),
    "precision.weights": choice("float32", lambda: ("float32", "int8")),
    "precision.group": integer(32, used_by=("precision.weights", ("int8",))),
    "sparsity.keep": fraction(1.0),
    "schedule.fuse": choice(False, lambda: (False, True)),
    "schedule.block": integer(16),
}


@pytest.mark.parametrize(
    ("units", "part", "left"),
    [
        (100, 0.55, 55),  # 55.00000000000001 by floats
        (3, 1 / 3, 1),
        (1.5, 2 / 3, 1),
        (7, 1, 7),
        (2, 0.3, None),
        (10, 0.0, None),
        (1, 1e-10, None),
        (1.5, 1, None),
    ],
)
def test_a_part_of_units_is_a_whole_number_of_them_or_none(units: float, part: float, left: int | None):
    assert whole_part(units, part) == left


# Spaces built by hand


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Knobs that switch others on, one of them over two steps, and rules that may leave nothing."""

    def some(values: list[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
        return st.lists(st.sampled_from(values), min_size=1, max_size=4, unique=True).map(tuple)

    knobs: dict[str, tuple[Value, ...]] = {
        "architecture.attention": draw(some(["mha", "gqa", "window", ("gqa", "window")])),
        "architecture.heads": draw(some([1, 2, 3, 4, 6, 8])),
        "architecture.kv_heads": draw(some([1, 2, 3, 4])),
        "architecture.window": draw(some([16, 64, 256])),
        "precision.weights": draw(some(["float32", "int8"])),
        "schedule.fuse": draw(some([False, True])),
        "schedule.block": draw(some([16, 32, 64])),
        "schedule.unroll": draw(some([1, 2, 4])),
    }
    when = {
        "architecture.kv_heads": Expression("'gqa' in architecture.attention"),
        "architecture.window": Expression("'window' in architecture.attention"),
        "schedule.block": Expression("schedule.fuse"),
        "schedule.unroll": Expression("schedule.block >= 32"),
    }
    limit = draw(st.integers(16, 600))
    rules = (
        Rule.require("groups", Expression("architecture.heads % architecture.kv_heads == 0"), "heads share caches"),
        Rule.require("small", Expression(f"architecture.heads * schedule.block <= {limit}"), "it must fit"),
    )
    return Space("drawn", knobs, when, rules)


def legal(space: Space) -> set[Candidate]:
    return {candidate for raw in space.points() if (candidate := space.candidate(raw))}


@given(spaces(), st.randoms(use_true_random=False))
def test_canonical_is_idempotent_and_drops_only_inactive_knobs(space: Space, rng: random.Random):
    raw = space.draw(rng)
    point = space.canonical(raw)
    assert space.canonical(point) == point
    assert point.items() <= raw.items()
    for name in raw:
        condition = space.when.get(name)
        active = condition is None or (condition.names <= point.keys() and bool(condition(point)))
        assert (name in point) is active


@given(spaces(), st.randoms(use_true_random=False))
def test_inactive_knobs_and_their_order_leave_the_uid_alone(space: Space, rng: random.Random):
    raw = space.draw(rng)
    point = space.canonical(raw)
    other = {name: raw[name] if name in point else rng.choice(space.knobs[name]) for name in raw}
    items = list(other.items())
    rng.shuffle(items)
    assert Candidate.from_point(space.canonical(dict(items))).uid == Candidate.from_point(point).uid


@given(spaces(), st.randoms(use_true_random=False))
def test_every_sample_is_legal_and_canonical(space: Space, rng: random.Random):
    possible = legal(space)
    if not possible:
        with pytest.raises(UserError, match="has no legal point"):
            space.sample(rng)
        return
    walked, drawn = space.sample(rng), None
    assert walked in possible
    try:
        drawn = space.sample(rng, tries=1)  # 1 try: the space is drawn from, not walked
    except UserError as error:
        assert "sampled points are refused by" in str(error) or space.size == 1
    assert drawn is None or drawn in possible


@given(spaces(), st.randoms(use_true_random=False))
def test_neighbours_are_legal_and_one_step_away(space: Space, rng: random.Random):
    possible = legal(space)
    assume(possible)
    candidate = space.sample(rng)
    neighbours = space.neighbours(candidate)
    assert candidate not in neighbours
    assert len({near.uid for near in neighbours}) == len(neighbours)
    for near in neighbours:
        assert near in possible
        shared = near.point.keys() & candidate.point.keys()
        moved = [name for name in shared if near.point[name] != candidate.point[name]]
        assert len(moved) == 1  # a knob that the step switched on or off is no step of its own
        (name,) = moved
        values = space.knobs[name]
        if all(isinstance(value, int | float) for value in values):
            assert abs(values.index(near.point[name]) - values.index(candidate.point[name])) == 1


@given(spaces(), st.randoms(use_true_random=False))
def test_steps_between_common_knobs_can_be_taken_back(space: Space, rng: random.Random):
    assume(legal(space))
    candidate = space.sample(rng)
    for near in space.neighbours(candidate):
        if near.point.keys() == candidate.point.keys():
            assert candidate in space.neighbours(near)


def test_names_step_to_every_other_name_and_numbers_to_the_next():
    space = Space("s", {"precision.weights": ("a", "b", "c"), "schedule.block": (16, 32, 64, 128)})
    start = Candidate.from_point({"precision.weights": "a", "schedule.block": 32})
    assert {tuple(near.point.values()) for near in space.neighbours(start)} == {
        ("b", 32),
        ("c", 32),
        ("a", 16),
        ("a", 64),
    }


def test_a_knob_that_a_step_switches_on_takes_every_value():
    """Its first value may make the step a bad one: a kernel that runs alone, where all of a layer would be one call."""
    knobs = {"schedule.matmul": ("dot", "cpp"), "schedule.fusion": ("none", "layer", "step"), "schedule.steps": (1, 4)}
    when = {"schedule.fusion": Expression("schedule.matmul == 'cpp'")}
    space = Space("s", knobs, when=when)
    start = Candidate.from_point({"schedule.matmul": "dot", "schedule.steps": 1})
    assert [near.point for near in space.neighbours(start)] == [
        {"schedule.matmul": "cpp", "schedule.fusion": "none", "schedule.steps": 1},
        {"schedule.matmul": "cpp", "schedule.fusion": "layer", "schedule.steps": 1},
        {"schedule.matmul": "cpp", "schedule.fusion": "step", "schedule.steps": 1},
        {"schedule.matmul": "dot", "schedule.steps": 4},
    ]


def test_no_legal_point_counts_the_rules_that_refused():
    space = Space(
        "hopeless",
        {"architecture.heads": (1, 2, 3, 4), "schedule.block": tuple(range(5))},
        rules=(
            Rule.require("odd", Expression("architecture.heads % 2 == 1"), "it must be odd"),
            Rule("never", lambda point: "nothing will do"),
        ),
    )
    with pytest.raises(UserError) as caught:
        space.sample(random.Random(0))
    head, *reasons = str(caught.value).splitlines()
    assert head == "the space 'hopeless' has no legal point; its 20 points are refused by"
    assert sorted(reason.strip().partition(", for example: ")[0] for reason in reasons) == [
        "50%  rule 'never'",
        "50%  rule 'odd'",
    ]
    assert any(
        "it must be odd (needs architecture.heads % 2 == 1; here architecture.heads=" in reason for reason in reasons
    )


def test_a_large_space_without_a_legal_point_is_sampled():
    knobs: dict[str, tuple[Value, ...]] = {f"schedule.k{i}": tuple(range(10)) for i in range(30)}
    space = Space("vast", knobs, rules=(Rule("never", lambda point: "no"),))
    with pytest.raises(UserError, match=r"its 50 sampled points are refused by\n +100%  rule 'never', for example: no"):
        space.sample(random.Random(0), tries=50)


def test_a_rule_says_nothing_of_a_knob_that_is_inactive():
    rule = Rule.require("groups", Expression("architecture.heads % architecture.kv_heads == 0"), "because")
    assert rule.why({"architecture.heads": 3}) is None
    assert rule.why({"architecture.heads": 3, "architecture.kv_heads": 2}) == (
        "because (needs architecture.heads % architecture.kv_heads == 0; here architecture.heads=3, "
        "architecture.kv_heads=2)"
    )


def test_refusals_are_told_by_rule_those_that_refuse_most_first():
    refusals = Refusals()
    for rule, why in (("few", "2 is few"), ("odd", "1 is odd"), ("odd", "3 is odd")):
        refusals.add(rule, why)
    assert refusals.total == 3
    assert refusals.lines(10) == [
        "    20%  rule 'odd', for example: 1 is odd",
        "    10%  rule 'few', for example: 2 is few",
    ]
    assert refusals.lines(10, most=1) == refusals.lines(10)[:1]


# Declared knobs


@pytest.mark.parametrize(
    ("knob", "value", "why"),
    [
        (choice("a", lambda: ("a", "b")), "b", None),
        (
            choice("alpha", lambda: ("alpha", "b")),
            "alpa",
            "unknown value 'alpa'; did you mean 'alpha'? Allowed: alpha, b",
        ),
        (choice(False, lambda: (False, True)), 1, "1 is not among False, True"),
        (integer(4), 1, None),
        (integer(4), 0, "0 is not a whole number of at least 1"),
        (integer(4), True, "True is not a whole number of at least 1"),
        (integer(4), 2.0, "2.0 is not a whole number of at least 1"),
        (integer(4, at_least=0), 0, None),
        (fraction(1.0), 1, None),
        (fraction(1.0), 0, "0 is not a number above 0 and up to 1"),
        (fraction(1.0), float("nan"), "nan is not a number above 0 and up to 1"),
        (fraction(1.0), "1", "'1' is not a number above 0 and up to 1"),
        (integer(4, per_layer=True), (1, 2), None),
        (integer(4, per_layer=True), (1, 0), "0 is not a whole number of at least 1"),
        (integer(4, per_layer=True), (), "a list by layer must not be empty"),
        (integer(4), (1, 2), "(1, 2) is not a whole number of at least 1"),
    ],
)
def test_a_knob_says_why_it_refuses(knob: Knob, value: Value, why: str | None):
    assert knob.refusal(value) == why


# Spaces from YAML


def read(path: Path, text: str, **more: Any) -> Space:
    path.write_text(text)
    return Space.from_yaml(path, DECLARED, **more)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.yaml"


GOOD = """
knobs:
  architecture.attention: [mha, gqa, [gqa, window]]
  architecture.kv_heads: [1, 2, 4]
  schedule.block: [16, 32]
when:
  schedule.block: schedule.fuse
rules:
  - {name: few, require: architecture.kv_heads <= 2, because: caches cost memory}
reference: {architecture.heads: 4}
"""


def test_a_space_is_read_with_defaults_conditions_and_rules(path: Path):
    space = read(path, GOOD)
    assert space.name == "tiny"
    assert space.knobs["architecture.attention"] == ("mha", "gqa", ("gqa", "window"))
    assert space.knobs["architecture.heads"] == (8,)
    assert set(space.when) == {"architecture.kv_heads", "architecture.window", "precision.group", "schedule.block"}
    assert space.reference.point == {
        "architecture.attention": "mha",
        "architecture.heads": 4,
        "precision.weights": "float32",
        "sparsity.keep": 1.0,
        "schedule.fuse": False,
    }
    assert {candidate.point.get("architecture.kv_heads") for candidate in legal(space)} == {None, 1, 2}


def test_overrides_replace_the_values_of_a_knob(path: Path):
    assert read(path, GOOD, overrides={"schedule.block": 64}).knobs["schedule.block"] == (64,)
    with pytest.raises(UserError, match=r"unknown knob 'schedule\.blok'; did you mean 'schedule\.block'"):
        read(path, GOOD, overrides={"schedule.blok": 64})


def test_values_that_somebody_does_not_allow_are_left_out(path: Path):
    def why_not(knob: str, value: Value) -> str | None:
        return "Only even ones" if knob == "architecture.attention" and value not in ("mha", "gqa") else None

    space = read(path, GOOD, only={"deploy=acme": why_not})
    assert space.knobs["architecture.attention"] == ("mha", "gqa")
    assert space.knobs["schedule.block"] == (16, 32)
    with pytest.raises(UserError) as caught:
        read(path, GOOD, only={"target=acme": lambda knob, _: "Too small" if knob == "schedule.block" else None})
    assert str(caught.value) == f"{path}: knobs.schedule.block: target=acme allows none of 16, 32. Too small"


def test_rules_of_the_axes_come_after_those_of_the_space(path: Path):
    space = read(path, GOOD, rules=(Rule("axes", lambda point: None),))
    assert [rule.name for rule in space.rules] == ["few", "axes"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a mapping"),
        ("- 1", "must hold a mapping"),
        ("knobs:", "'knobs' is empty. A space needs at least one knob"),
        ("knobs: {}", "'knobs' is empty"),
        ("knobs: [1]", "'knobs' must be a mapping"),
        ("knob: {}", "unknown key 'knob'; did you mean 'knobs'? Allowed: knobs, when, rules, reference"),
        ("1: {}", "unknown key 1. Allowed: knobs, when, rules, reference"),
        (
            "knobs: {architecture.head: [1]}",
            "knobs.architecture.head: unknown knob 'architecture.head'; did you mean 'architecture.heads'? Allowed: ",
        ),
        ("knobs: {schedule.block: []}", "knobs.schedule.block: needs a list of at least one value"),
        ("knobs: {schedule.block: }", "knobs.schedule.block: None is not a whole number of at least 1"),
        ("knobs: {schedule.block: [16, 16]}", "each only once, and has [16, 16]"),
        ("knobs: {schedule.block: [16, 0]}", "knobs.schedule.block: 0 is not a whole number of at least 1"),
        ("knobs: {schedule.block: {a: 1}}", "knobs.schedule.block: {'a': 1} is not a whole number"),
        ("knobs: {schedule.block: [2020-01-01]}", "is not a whole number"),
        (
            "knobs: {precision.weights: [int9]}",
            "knobs.precision.weights: unknown value 'int9'; did you mean 'int8'? Allowed: float32, int8",
        ),
        ("knobs: {architecture.attention: [[mha, mga]]}", "unknown value 'mga'; did you mean 'mha'?"),
        ("knobs: {architecture.attention: [[]]}", "a list by layer must not be empty"),
        ("knobs: {schedule.block: [1]}\nwhen: {schedule.blck: x}", "when.schedule.blck: unknown knob 'schedule.blck'"),
        (
            "knobs: {schedule.block: [1]}\nwhen: {schedule.block: nothing}",
            "when.schedule.block: unknown knob 'nothing'",
        ),
        (
            "knobs: {schedule.block: [1]}\nwhen: {schedule.block: schedule.fuse.__class__}",
            "when.schedule.block: unknown knob 'schedule.fuse.__class__'",
        ),
        ("knobs: {schedule.block: [1]}\nwhen: {schedule.block: open('x')}", "when.schedule.block: expression"),
        ("knobs: {schedule.block: [1]}\nwhen: 3", "'when' must be a mapping"),
        ("knobs: {schedule.block: [1]}\nrules: 3", "'rules' must be a list"),
        ("knobs: {schedule.block: [1]}\nrules: {a: b}", "'rules' must be a list"),
        ("knobs: {schedule.block: [1]}\nrules: [a]", "rules[0]: must have exactly the keys name, require, because"),
        ("knobs: {schedule.block: [1]}\nrules: [{name: a}]", "rules[0]: must have exactly the keys"),
        (
            "knobs: {schedule.block: [1]}\nrules: [{name: a, require: 'schedule.block +', because: b}]",
            "rules[0]: expression 'schedule.block +'",
        ),
        (
            "knobs: {schedule.block: [1]}\nrules: [{name: a, require: schedule.block < 'x', because: b}]",
            "rules[0]: expression \"schedule.block < 'x'\": '<' not supported",
        ),
        (
            "knobs: {schedule.block: [1, 2]}\nrules: [{name: big, require: schedule.block > 2, because: tiny}]",
            "the space 'tiny' has no legal point; its 2 points are refused by\n   100%  rule 'big', for example: tiny",
        ),
        (
            "knobs: {schedule.block: [1]}\nrules: [{name: big, require: schedule.block < 9, because: small}]",
            "reference: rule 'big': small (needs schedule.block < 9; here schedule.block=16)",
        ),
        ("knobs: {schedule.block: [1]}\nreference: {schedule.blok: 1}", "reference.schedule.blok: unknown knob"),
        (
            "knobs: {schedule.block: [1]}\nreference: {schedule.block: x}",
            "reference.schedule.block: 'x' is not a whole",
        ),
    ],
)
def test_a_wrong_space_names_file_key_and_what_is_allowed(path: Path, text: str, message: str):
    with pytest.raises(UserError) as caught:
        read(path, text)
    assert message in str(caught.value)
    assert path.stem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "the key 'a' stands 2 times (line 1)"),
        ("b:\n  a: {c: 1}\n  a: {c: 1}", "the key 'a' stands 2 times (line 2)"),
        ("b:\n  1: x\n  '1': y", "the key '1' stands 2 times"),
        ("a: &x [1]\nb: *x", "aliases are not allowed (line 2)"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor for the tag"),
        ("a: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("a: !mine 1", "could not determine a constructor for the tag"),
        ("<<: {a: 1}", "could not determine a constructor for the tag"),
        ("a: [1", "not readable as YAML"),
        ("? [a]\n: 1", "not readable as YAML"),
        ("a: 2020-99-99", "not readable as YAML"),
        ("a: " + "9" * 5000, "not readable as YAML"),
        ("a: 1\n---\nb: 2", "not readable as YAML"),
        ("a: " + "[" * 5000, "too deeply nested"),
        ("just text", "must hold a mapping"),
        ("#" * 1_000_001, "larger than 1000000 bytes"),
    ],
)
def test_yaml_that_is_ambiguous_or_dangerous_is_refused(path: Path, text: str, message: str):
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"missing\.yaml: No such file or directory"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(UserError, match=r"latin\.yaml: not readable as YAML: 'utf-8'"):
        read_yaml(tmp_path / "latin.yaml")


def test_lists_of_lists_do_not_blow_a_small_file_up(path: Path):
    path.write_text(
        "a: &a [x, x]\n" + "\n".join(f"{b}: &{b} [*{a}, *{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    )
    with pytest.raises(UserError, match="aliases are not allowed"):
        read_yaml(path)
