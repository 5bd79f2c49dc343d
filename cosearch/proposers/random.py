"""Uniform random search, the control that every method must beat."""

import random
from collections.abc import Sequence

from cosearch.core.candidate import Candidate
from cosearch.core.trial import Trial
from cosearch.proposers import PROPOSERS, Setting

_TRIES = 200
"""Draws for each new candidate, before the space counts as exhausted."""


@PROPOSERS.register("random")
class RandomProposer:
    """Legal candidates, each once."""

    def __init__(self, setting: Setting) -> None:
        self._space = setting.space
        self._rng = random.Random(setting.seed)
        self._seen: set[str] = set()

    def ask(self, n: int) -> Sequence[Candidate]:
        found: list[Candidate] = []
        for _ in range(_TRIES * n):
            if len(found) == n:
                break
            candidate = self._space.candidate(self._space.draw(self._rng))
            if candidate is not None and candidate.uid not in self._seen:
                self._seen.add(candidate.uid)
                found.append(candidate)
        return found

    def tell(self, trials: Sequence[Trial]) -> None:
        self._seen |= {trial.uid for trial in trials}
