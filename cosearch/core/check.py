"""Checks of numbers that people write; each raises a UserError that says where and what is right."""

import math
from typing import Any

from cosearch.core.errors import UserError


def whole(value: Any, at_least: int, where: str) -> None:
    """Refuse what is no whole number of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise UserError(f"{where}: {value!r} is not a whole number of at least {at_least}")


def share(value: Any, where: str) -> None:
    """Refuse what is no number from 0 to 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise UserError(f"{where}: {value!r} is not a number from 0 to 1")


def positive(value: Any, where: str) -> None:
    """Refuse what is no finite number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{where}: {value!r} is not a number above 0")
