"""Search methods, one per file. To add one, write `<name>.py` here (or in a package of your own, by an entry point
in the group `cosearch.proposer`) and register a callable that takes a `Setting`; `cosearch.testing.check_proposer`
then tests it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cosearch.core.errors import UserError
from cosearch.core.problem import Problem
from cosearch.core.registry import Registry, did_you_mean
from cosearch.core.space import Space
from cosearch.core.trial import Proposer


@dataclass(frozen=True)
class Setting:
    """What a proposer is made for: the space, the problem, a seed, and its own options by name."""

    space: Space
    problem: Problem
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def read(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The options, with `defaults` for those not given.

        Raises:
            UserError: an option is unknown, or not of its default's type, or a number below 1.
        """
        for name, value in self.options.items():
            if name not in defaults:
                raise UserError(f"proposer.{name}: unknown option{did_you_mean(name, tuple(defaults))}")
            wanted = type(defaults[name])
            if not isinstance(value, wanted) or isinstance(value, bool) or (wanted is int and value < 1):
                what = "a whole number of at least 1" if wanted is int else "a name"
                raise UserError(f"proposer.{name}: {value!r} is not {what}, for example {defaults[name]!r}")
        return {**defaults, **self.options}


PROPOSERS: Registry[Callable[[Setting], Proposer]] = Registry("proposer", __name__)
