"""Small conditions over named values, as they stand in search spaces, rules and constraints.

`architecture.heads % architecture.kv_heads == 0` reads a point of a space, `bits_per_byte <= 1.02 * reference`
reads a trial's metrics. The grammar is a subset of Python's expressions: numbers, strings, lists, dotted
names, arithmetic, comparisons, `and`, `or`, `not`, `in`. It is interpreted here and never executed as
Python. A value that differs by layer is a list, so `x in name` also holds when `name` is `x` itself.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from cosearch.core.errors import UserError


def _of_numbers(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    # Strings and lists are only compared: 'x' * 10**12 would fill the memory, and '%999999999d' % 1 as well.
    def apply(a: Any, b: Any) -> Any:
        for operand in (a, b):
            if isinstance(operand, str | list | tuple):
                raise TypeError(f"{operand!r} is not a number")
        return operation(a, b)

    return apply


_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: _of_numbers(operator.add),
    ast.Sub: _of_numbers(operator.sub),
    ast.Mult: _of_numbers(operator.mul),
    ast.Div: _of_numbers(operator.truediv),
    ast.FloorDiv: _of_numbers(operator.floordiv),
    ast.Mod: _of_numbers(operator.mod),
}
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in (b if isinstance(b, list | tuple) else (b,)),
    ast.NotIn: lambda a, b: a not in (b if isinstance(b, list | tuple) else (b,)),
}


@dataclass(frozen=True)
class Expression:
    """A parsed condition; `names` are the dotted names that it reads."""

    text: str
    where: str = ""
    _read: Callable[[Mapping[str, Any]], Any] = field(init=False, repr=False, compare=False)
    names: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            names: set[str] = set()
            tree = ast.parse(self.text.strip(), mode="eval").body
            self._check(tree, names)
            read = _reader(tree)
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{self._at()}: {error.args[0]}") from None
        except (RecursionError, MemoryError):
            raise UserError(f"{self._at()[:200]}: too long or too deeply nested") from None
        object.__setattr__(self, "_read", read)
        object.__setattr__(self, "names", frozenset(names))

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Evaluate over `values`, which must hold every name of `names`.

        Raises:
            UserError: a value is of a type or size that the operation cannot take.
        """
        try:
            return self._read(values)
        except (TypeError, ArithmeticError) as error:
            read = ", ".join(f"{name}={values[name]!r}" for name in sorted(self.names))
            raise UserError(f"{self._at()}: {error} (with {read})") from None
        except RecursionError:
            raise UserError(f"{self._at()[:200]}: too long or too deeply nested") from None

    def _at(self) -> str:
        return f"{self.where + ': ' if self.where else ''}expression {self.text!r}"

    def _check(self, node: ast.expr, names: set[str]) -> None:
        match node:
            case ast.Constant(value=bool() | int() | float() | str()):
                return
            case ast.Name() | ast.Attribute():
                names.add(_dotted(node) or self._refuse(node))
                return
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                parts = [left, right]
            case ast.Compare(left=left, ops=ops, comparators=comparators) if all(type(op) in _COMPARE for op in ops):
                parts = [left, *comparators]
            case ast.BoolOp(values=parts) | ast.List(elts=parts) | ast.Tuple(elts=parts):
                pass
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                parts = [operand]
            case _:
                self._refuse(node)
        for part in parts:
            self._check(part, names)

    def _refuse(self, node: ast.AST) -> NoReturn:
        raise UserError(
            f"{self._at()}: {ast.unparse(node)!r} is not allowed. Allowed: numbers, strings, lists, dotted "
            "names, + - * / // %, comparisons, and, or, not, in"
        )


def _dotted(node: ast.expr) -> str | None:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            left = _dotted(value)
            return left and f"{left}.{attr}"
    return None


def _reader(node: ast.expr) -> Callable[[Mapping[str, Any]], Any]:
    """A function that evaluates `node`: a space asks thousands of times, so the tree is walked once."""
    match node:
        case ast.Constant(value=value):
            return lambda values: value
        case ast.Name() | ast.Attribute():
            name = _dotted(node) or ""
            return lambda values: values[name]
        case ast.BinOp(left=left, op=op, right=right):
            binary, first, second = _BINARY[type(op)], _reader(left), _reader(right)
            return lambda values: binary(first(values), second(values))
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            return _comparison(
                _reader(left), [(_COMPARE[type(op)], _reader(b)) for op, b in zip(ops, comparators, strict=True)]
            )
        case ast.BoolOp(op=op, values=parts):
            some, readers = isinstance(op, ast.Or), [_reader(part) for part in parts]
            return lambda values: (any if some else all)(reader(values) for reader in readers)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            negated = _reader(operand)
            return lambda values: not negated(values)
        case ast.UnaryOp(operand=operand):
            positive = _reader(operand)
            return lambda values: -positive(values)
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            items = [_reader(part) for part in parts]
            return lambda values: [item(values) for item in items]
    raise AssertionError(f"{ast.dump(node)} passed the check of its expression")


def _comparison(
    first: Callable[[Mapping[str, Any]], Any],
    others: list[tuple[Callable[[Any, Any], bool], Callable[[Mapping[str, Any]], Any]]],
) -> Callable[[Mapping[str, Any]], bool]:
    """Of a chain such as 1 < a <= 2, each with the next."""

    def holds(values: Mapping[str, Any]) -> bool:
        a = first(values)
        for compare, other in others:
            b = other(values)
            if not compare(a, b):
                return False
            a = b
        return True

    return holds
