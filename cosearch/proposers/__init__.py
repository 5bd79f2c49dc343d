"""Search methods, one per file. To add one, write `<name>.py` here (or in a package of your own, by an entry point
in the group `cosearch.proposer`) and register a callable that takes a `Setting`; `cosearch.testing.check_proposer`
then tests it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cosearch.core.problem import Problem
from cosearch.core.registry import Registry
from cosearch.core.space import Space
from cosearch.core.trial import Proposer


@dataclass(frozen=True)
class Setting:
    """What a proposer is made for: the space, the problem, a seed, and its own options by name."""

    space: Space
    problem: Problem
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)


PROPOSERS: Registry[Callable[[Setting], Proposer]] = Registry("proposer", __name__)
