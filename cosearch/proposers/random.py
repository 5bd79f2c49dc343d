"""Uniform random search, the control that every method must beat."""

import random
from collections.abc import Sequence

from cosearch.core.candidate import Candidate
from cosearch.core.trial import Trial
from cosearch.proposers import PROPOSERS, Setting

_REPEATS, _REFUSED = 1000, 50_000
"""Draws in a row that were there before, or that rules refuse, after which the space counts as exhausted."""


@PROPOSERS.register("random")
class RandomProposer:
    """Legal candidates, each once."""

    def __init__(self, setting: Setting) -> None:
        setting.read({})
        self._space = setting.space
        self._rng = random.Random(setting.seed)
        self._seen: set[str] = set()
        self._drawn: set[str] = set()

    def ask(self, n: int) -> Sequence[Candidate]:
        found: list[Candidate] = []
        repeats = refused = 0
        while len(found) < n and repeats < _REPEATS and refused < _REFUSED:
            raw = self._space.draw(self._rng)
            if (drawn := repr(raw)) in self._drawn:
                repeats += 1
                continue
            self._drawn.add(drawn)
            candidate = self._space.candidate(raw)
            if candidate is None:
                refused += 1
            elif candidate.uid in self._seen:
                repeats += 1
            else:
                self._seen.add(candidate.uid)
                found.append(candidate)
                repeats = refused = 0
        return found

    def tell(self, trials: Sequence[Trial]) -> None:
        self._seen |= {trial.uid for trial in trials}
