"""Serving stacks, one per file: what each can load. To add one, write `<name>.py` here and register a `ServingStack`;
`cosearch.testing.check_stack` then tests it.

A search with `deploy=<name>` proposes only what that stack can load.
"""

from collections.abc import Mapping
from typing import Protocol

from cosearch.core.candidate import Candidate, Value
from cosearch.core.registry import Registry


class ServingStack(Protocol):
    """What a file of this folder registers."""

    @property
    def loads(self) -> Mapping[str, frozenset[Value]]:
        """Knobs of which it loads some values only, in whatever else: the others are left out of a space."""
        ...

    def why_not(self, candidate: Candidate) -> str | None:
        """Why the stack cannot load a candidate; None where it can. The candidate is legal in its space."""
        ...


STACKS: Registry[ServingStack] = Registry("stack", __name__)
