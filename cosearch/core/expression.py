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
    _tree: ast.expr = field(init=False, repr=False, compare=False)
    names: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            names: set[str] = set()
            tree = ast.parse(self.text.strip(), mode="eval").body
            self._check(tree, names)
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{self._at()}: {error.args[0]}") from None
        except (RecursionError, MemoryError):
            raise UserError(f"{self._at()[:200]}: too long or too deeply nested") from None
        object.__setattr__(self, "_tree", tree)
        object.__setattr__(self, "names", frozenset(names))

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Evaluate over `values`, which must hold every name of `names`.

        Raises:
            UserError: a value is of a type or size that the operation cannot take.
        """
        try:
            return _evaluate(self._tree, values)
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


def _evaluate(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name() | ast.Attribute():
            return values[_dotted(node) or ""]
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_evaluate(left, values), _evaluate(right, values))
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            a = _evaluate(left, values)
            for op, comparator in zip(ops, comparators, strict=True):
                b = _evaluate(comparator, values)
                if not _COMPARE[type(op)](a, b):
                    return False
                a = b
            return True
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_evaluate(part, values) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_evaluate(part, values) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _evaluate(operand, values)
        case ast.UnaryOp(operand=operand):
            return -_evaluate(operand, values)
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_evaluate(part, values) for part in parts]
    raise AssertionError(f"{ast.dump(node)} passed the check of its expression")
