"""How many candidates a space has: its distinct points are counted, and some are drawn to tell the share that is legal.

Raw points that differ in inactive knobs only are one candidate. A candidate with few active knobs is many orders of
magnitude more raw points than one with many, so drawing raw points says next to nothing of how many candidates there
are. Here every candidate is drawn with the same chance.
"""

import itertools
import math
import random
from dataclasses import dataclass

from scipy.stats import binomtest

from cosearch.core.candidate import Candidate, Point, Value, canonical_json
from cosearch.core.errors import UserError
from cosearch.core.space import Refusals, Space

_MOST_COMBINATIONS = 1_000_000


@dataclass(frozen=True)
class _Group:
    """Knobs that conditions link: which of them are active, no other knob has a say in.

    `points` are the distinct ones of the knobs that decide, with any values of those that no condition names. `free`
    names, for each, those of the latter that are active, and `counts` says how many points their values make of it.
    """

    points: list[Point]
    free: list[list[str]]
    counts: list[int]


class DistinctPoints:
    """The canonical points of a space, legal or not.

    Raises:
        UserError: the space's conditions link so many values that their combinations cannot be listed.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._groups = [_group(space, names) for names in _linked(space)]
        self.count = math.prod(sum(group.counts) for group in self._groups)

    def draw(self, rng: random.Random) -> dict[str, Value]:
        """One of them; all have the same chance."""
        point: dict[str, Value] = {}
        for group in self._groups:
            (at,) = rng.choices(range(len(group.points)), group.counts)
            point |= group.points[at]
            point |= {name: rng.choice(self._space.knobs[name]) for name in group.free[at]}
        return point


class Survey:
    """Distinct points of a space, drawn and counted: how many are legal, and which rules refuse the others."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self.points = DistinctPoints(space)
        self.legal = 0
        self.refusals = Refusals()
        self.example: Candidate | None = None

    @property
    def drawn(self) -> int:
        return self.legal + self.refusals.total

    def draw(self, rng: random.Random) -> None:
        """Draw one more point."""
        point = self.points.draw(rng)
        broken = self._space.broken_rule(point)
        if broken is not None:
            self.refusals.add(*broken)
            return
        self.legal += 1
        self.example = self.example or Candidate.from_point(point)

    def share(self) -> tuple[float, float]:
        """The 90 % interval (Wilson's) of the share of the distinct points that is legal."""
        interval = binomtest(self.legal, self.drawn).proportion_ci(0.9, method="wilson")
        return interval.low, interval.high


def _linked(space: Space) -> list[set[str]]:
    """The knobs in groups: each stands together with those that its condition names."""
    groups: list[set[str]] = []
    for name in space.knobs:
        group = {name}
        if name in space.when:
            group |= space.when[name].names & space.knobs.keys()
        apart = [other for other in groups if other.isdisjoint(group)]
        groups = [*apart, group.union(*(other for other in groups if other not in apart))]
    return groups


def _group(space: Space, names: set[str]) -> _Group:
    named = frozenset[str]().union(*(space.when[name].names for name in names if name in space.when))
    deciding = [name for name in space.knobs if name in names & named]
    combinations = math.prod(len(space.knobs[name]) for name in deciding)
    if combinations > _MOST_COMBINATIONS:
        raise UserError(
            f"the space {space.name!r}: its conditions ('when') link {', '.join(deciding)}, whose values make "
            f"{combinations:,} combinations; up to {_MOST_COMBINATIONS:,} can be counted"
        )
    # Whatever values the other knobs have, they decide nothing, so any will do.
    some = {name: space.knobs[name][0] for name in names}
    distinct = {}
    for values in itertools.product(*(space.knobs[name] for name in deciding)):
        point = space.canonical(some | dict(zip(deciding, values, strict=True)))
        distinct[canonical_json(point)] = point
    points = list(distinct.values())
    free = [[name for name in point if name not in named] for point in points]
    return _Group(points, free, [math.prod(len(space.knobs[name]) for name in own) for own in free])
