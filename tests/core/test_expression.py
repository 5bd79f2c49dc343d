from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosearch.core.errors import UserError
from cosearch.core.expression import Expression

NAMES = ("heads", "width", "schedule.block", "a.b.c")

numbers = st.one_of(
    st.integers(-20, 20).map(str),
    st.floats(-100, 100, allow_nan=False).map(repr),
    st.sampled_from(NAMES),
)
arithmetic = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner).map(" ".join),
        inner.map("({})".format),
        inner.map("-({})".format),
    ),
    max_leaves=8,
)
comparisons = st.one_of(
    st.tuples(arithmetic, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), arithmetic).map(" ".join),
    st.tuples(arithmetic, st.sampled_from(["<", "<="]), arithmetic, st.sampled_from(["<", "!="]), arithmetic).map(
        " ".join
    ),
    st.tuples(arithmetic, st.sampled_from([" in [", " not in ["]), arithmetic, arithmetic).map(
        lambda parts: f"{parts[0]}{parts[1]}{parts[2]}, {parts[3]}]"
    ),
)
conditions = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda parts: f"({' '.join(parts)})"),
        inner.map("not ({})".format),
    ),
    max_leaves=4,
)
values = st.fixed_dictionaries({name: st.integers(-9, 9) | st.floats(-9, 9, allow_nan=False) for name in NAMES})


def python(text: str, known: dict[str, Any]) -> Any:
    """What Python itself makes of `text`."""
    scope = {
        "heads": known["heads"],
        "width": known["width"],
        "schedule": SimpleNamespace(block=known["schedule.block"]),
        "a": SimpleNamespace(b=SimpleNamespace(c=known["a.b.c"])),
    }
    return eval(text, {"__builtins__": {}}, scope)


@given(arithmetic | conditions, values)
def test_agrees_with_python(text: str, known: dict[str, Any]):
    expression = Expression(text)
    try:
        expected = python(text, known)
    except ArithmeticError:
        with pytest.raises(UserError):
            expression(known)
    else:
        found = expression(known)
        assert found == expected
        assert type(found) is type(expected)


@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused_to_the_user(text: str):
    try:
        Expression(text)
    except UserError as error:
        assert "expression" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "open('x')",
        "heads()",
        "().__class__",
        "(1).real",
        "'a'.join",
        "[].__class__.__base__",
        "lambda: 1",
        "(lambda x: x)(1)",
        "f'{heads}'",
        "f''",
        "heads[0]",
        "[x for x in heads]",
        "{x for x in heads}",
        "{heads: 1}",
        "{1, 2}",
        "(x := 1)",
        "1 if heads else 2",
        "[*heads]",
        "heads ** 2",
        "heads << 1",
        "heads | 1",
        "heads @ width",
        "~heads",
        "+heads",
        "heads is width",
        "None",
        "...",
        "b'bytes'",
        "1j",
        "await heads",
    ],
)
def test_what_could_run_code_is_refused(text: str):
    with pytest.raises(UserError, match=r"is not allowed\. Allowed: numbers, strings, lists, dotted names"):
        Expression(text)


@pytest.mark.parametrize(
    "text", ["", " ", "heads +", "x = 1", "import os", "yield", "1; 2", "(", "heads.", "a b", "\0"]
)
def test_what_is_no_expression_is_refused(text: str):
    with pytest.raises(UserError, match="expression"):
        Expression(text)


class Untouchable:
    """Fails the test as soon as an attribute of it is looked up."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"looked up {name}")


def test_a_dotted_name_is_looked_up_whole_and_never_as_an_attribute():
    expression = Expression("heads.__class__ == 3")
    assert expression.names == {"heads.__class__"}
    assert expression({"heads": Untouchable(), "heads.__class__": 3}) is True


def test_names_are_the_dotted_names_that_are_read():
    assert Expression("architecture.heads % kv == 0 and 'x' in sparsity.pattern").names == {
        "architecture.heads",
        "kv",
        "sparsity.pattern",
    }


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("'mha' in kind", "mha", True),
        ("'mha' in kind", "mha2", False),
        ("'mh' in kind", "mha", False),
        ("'mha' in kind", ("gqa", "mha"), True),
        ("'mha' not in kind", ("gqa", "mqa"), True),
        ("'mha' not in kind", "mha", False),
        ("kind in ['gqa', 'mqa']", "mqa", True),
        ("kind in ('gqa', 'mqa')", "mha", False),
    ],
)
def test_in_holds_of_one_value_and_of_a_list_by_layer(text: str, value: Any, holds: bool):
    assert Expression(text)({"kind": value}) is holds


def test_and_or_and_chains_stop_early_as_in_python():
    assert Expression("x == 0 or 1 / x > 2")({"x": 0}) is True
    assert Expression("x != 0 and 1 / x > 2")({"x": 0}) is False
    assert Expression("1 < x < 1 / x")({"x": 0}) is False


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("x / 0", "division"),
        ("x + 'a'", "'a' is not a number"),
        ("'a' * 1000000000000", "'a' is not a number"),
        ("[1] * 1000000000000", "is not a number"),
        ("'%999999999999d' % x", "is not a number"),
        ("x < 'a'", "not supported"),
        (f"{10**400} / 1.5 < x", "too large"),
    ],
)
def test_an_operation_that_cannot_be_done_names_the_place_and_the_values(text: str, part: str):
    with pytest.raises(UserError) as caught:
        Expression(text, "space.yaml: rules[2]")({"x": 7})
    assert str(caught.value).startswith("space.yaml: rules[2]: expression ")
    assert part in str(caught.value)
    assert "'" in text or "[" in text or "x=7" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["not " * 3000 + "x", "x + " * 30_000 + "x", "(" * 500 + "x" + ")" * 500, "-" * 5000 + "1"]
)
def test_endless_nesting_is_refused_and_no_crash(text: str):
    with pytest.raises(UserError):
        Expression(text)({"x": 1})
