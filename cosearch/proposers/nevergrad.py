"""An evolution strategy by nevergrad, over the losses of all objectives at once.

A knob is a coordinate of the unit cube, cut evenly into its values in their order. (With nevergrad's own `Choice` and
`TransitionChoice` an `ask` took 8 ms instead of 0.2 ms, too long to be asked for thousands; 14 knobs of 4 values.)
"""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cosearch.core.candidate import Candidate
from cosearch.core.errors import UserError
from cosearch.core.problem import LOSS_LIMIT
from cosearch.core.registry import did_you_mean
from cosearch.core.trial import Trial
from cosearch.proposers import PROPOSERS, Setting

with warnings.catch_warnings():
    # Importing it, not using it, warns of optional packages and of other people's deprecations.
    warnings.simplefilter("ignore")
    import nevergrad as ng

_OPTIMIZER = "RecES"
"""Evolution with recombination. Nevergrad 1.0.12's differential evolution and particle swarm lose track of their
population (KeyError) when many are asked for and few told, or others told than were asked for."""
_TRIES = 1000
"""Asks in a row that give nothing new, after which the method counts as exhausted."""
_FAILED_LOSS = LOSS_LIMIT + 1
"""What a failed or infeasible candidate is told as: finite, and worse than the reference point (nevergrad takes the
first losses for its reference otherwise, and one infinity poisons it)."""


@PROPOSERS.register("nevergrad")
class NevergradProposer:
    """Legal candidates, each once. The option `optimizer` names one of nevergrad's, `RecES` if not given."""

    def __init__(self, setting: Setting) -> None:
        self._space, self._problem = setting.space, setting.problem
        self._knobs = {name: values for name, values in setting.space.knobs.items() if len(values) > 1}
        cube = ng.p.Array(init=np.full(max(len(self._knobs), 1), 0.5)).set_mutation(sigma=0.2).set_bounds(0.0, 1.0)
        cube.random_state = np.random.RandomState(setting.seed)
        name = setting.read({"optimizer": _OPTIMIZER})["optimizer"]
        if name not in ng.optimizers.registry:
            raise UserError(f"proposer.optimizer: unknown{did_you_mean(name, tuple(sorted(ng.optimizers.registry)))}")
        self._optimizer = ng.optimizers.registry[name](cube, budget=100_000)
        self._count = len(setting.problem.objectives)
        self._optimizer.tell(ng.p.MultiobjectiveReference(), [LOSS_LIMIT] * self._count)
        self._asked: dict[str, Any] = {}
        self._tried: set[tuple[int, ...]] = set()
        self._told: set[str] = set()
        self._reference: dict[str, float] = {}

    def ask(self, n: int) -> Sequence[Candidate]:
        return list(itertools.islice(self._proposals(), n))

    def tell(self, trials: Sequence[Trial]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for trial in trials:
                if trial.uid == self._space.reference.uid:
                    self._reference = trial.values
                if trial.uid not in self._told:
                    self._told.add(trial.uid)
                    asked = self._asked.pop(trial.uid, None)
                    place = self._place(trial.candidate) if asked is None else asked
                    self._optimizer.tell(place, self._losses(trial))

    def _proposals(self) -> Iterator[Candidate]:
        misses = 0
        while misses < _TRIES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                asked = self._optimizer.ask()
            misses += 1
            places = zip(self._knobs.values(), asked.value, strict=False)
            steps = tuple(min(int(place * len(values)), len(values) - 1) for values, place in places)
            if steps in self._tried:
                continue
            self._tried.add(steps)
            raw = {name: values[0] for name, values in self._space.knobs.items()}
            raw |= {name: values[step] for (name, values), step in zip(self._knobs.items(), steps, strict=True)}
            candidate = self._space.candidate(raw)
            if candidate is not None and candidate.uid not in self._asked and candidate.uid not in self._told:
                self._asked[candidate.uid] = asked
                misses = 0
                yield candidate

    def _place(self, candidate: Candidate) -> Any:
        """Somebody else's candidate as if it had been asked for; an inactive or foreign value lies in the middle."""
        point, places = candidate.point, []
        for name, values in self._knobs.items():
            inside = name in point and point[name] in values
            places.append((values.index(point[name]) + 0.5) / len(values) if inside else 0.5)
        self._optimizer.suggest(np.array(places or [0.5]))
        return self._optimizer.ask()

    def _losses(self, trial: Trial) -> list[float]:
        losses = self._problem.losses(trial.values, self._reference) if self._reference else None
        if losses is None or self._problem.excess(trial.values, self._reference) > 0:
            return [_FAILED_LOSS] * self._count
        return np.minimum(losses, _FAILED_LOSS).tolist()
