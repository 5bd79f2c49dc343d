"""Screen thousands of proposals by what a surrogate expects of them, and measure only the most promising.

Another proposer supplies the proposals; one-knob neighbours of the front join them, and crosses, which take some axes
of a proposal and the rest of a point on the front: what made one architecture fast is tried on the next. The surrogate
is the learned latency and quality models. What counts is the expected gain of hypervolume under the models'
uncertainty, over draws from it, for each second that the candidate will cost: a new architecture must be trained, a
new format of a known one evaluated, and a new schedule only timed.

The first candidates are a fixed design that depends on the seed alone: the reference with one step of its schedule,
which needs no training; then few architectures, so that few trainings teach the most, crossed with many formats,
patterns and schedules. Each of these axes is the reference's as often as not, so that what one does is seen apart from
the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cosearch import axes
from cosearch.core import pareto
from cosearch.core.candidate import AXES, Candidate
from cosearch.core.metric import Z90, Metrics, predicted
from cosearch.core.problem import LOSS_LIMIT
from cosearch.core.trial import Trial
from cosearch.latency.model import LatencyModel, Prediction
from cosearch.proposers import PROPOSERS, Setting
from cosearch.quality.predictor import QualityModel

_DRAWS = 16
_EXACT = 250
"""Proposals whose expected gain is computed exactly, of the thousands considered."""
_REMEMBERED = 1000
"""Of those considered, the best that are considered again."""
_LIMIT = 1.2
"""What is worse than the front's worst by more than a fifth of its range gains nothing."""
_LEAST_SPAN = 0.05
_DESIGN_TRIES = 400
_NOT_REPEATED = ("propose", "quality")
"""Stages whose seconds say nothing of what another candidate will cost."""


@PROPOSERS.register("surrogate")
class SurrogateProposer:
    """Options: `inner` proposer, `pool` proposals screened for each ask, `design` candidates proposed before the
    first screening, `architectures` among those."""

    def __init__(self, setting: Setting) -> None:
        options = setting.read({"inner": "nevergrad", "pool": 500, "design": 26, "architectures": 4})
        self._space, self._problem = setting.space, setting.problem
        self._inner = PROPOSERS[options["inner"]](replace(setting, options={}))
        self._pool = options["pool"]
        self._rng = np.random.default_rng(setting.seed)
        self._models = (LatencyModel(setting.space, setting.problem), QualityModel(setting.space))
        self._trials: dict[str, Trial] = {}
        self._proposed: set[str] = {setting.space.reference.uid}
        self._considered: dict[str, Candidate] = {}
        self._scored: set[str] = set()
        self._design = self._first(options["design"], options["architectures"])
        self._fitted = 0

    def ask(self, n: int) -> Sequence[Candidate]:
        design = [candidate for candidate in self._design if candidate.uid not in self._proposed]
        chosen = design[:n] if design or not self._reference else self._screen(n)
        self._proposed |= {candidate.uid for candidate in chosen}
        return chosen

    def tell(self, trials: Sequence[Trial]) -> None:
        self._trials |= {trial.uid: trial for trial in trials}
        self._proposed |= {trial.uid for trial in trials}
        self._inner.tell(trials)

    def predict(self, candidate: Candidate) -> Metrics:
        """What the models expect of one candidate, with 90 % intervals; nothing before they have learnt."""
        self._fit()
        if not self._fitted:
            return {}
        found = {}
        for name, prediction in self._predictions([candidate]).items():
            low, middle, high = (float(prediction.quantile(z)[0]) for z in (-Z90, 0.0, Z90))
            found[name] = predicted(name, middle, (low, high), prediction.model)
        return found

    @property
    def considered(self) -> int:
        """How many distinct candidates its models have scored."""
        return len(self._scored)

    @property
    def _reference(self) -> Mapping[str, float]:
        trial = self._trials.get(self._space.reference.uid)
        return trial.values if trial else {}

    def _first(self, count: int, architectures: int) -> list[Candidate]:
        proposals = list(self._inner.ask(_DESIGN_TRIES))
        self._considered = {candidate.uid: candidate for candidate in proposals}
        # The reference's own architecture is among them: it is trained in any case.
        by_architecture: dict[str, Candidate] = {}
        for candidate in (self._space.reference, *proposals):
            if len(by_architecture) < architectures:
                by_architecture.setdefault(candidate.key("architecture"), candidate)
        first = list(by_architecture.values())
        reference = self._space.reference
        steps = [near for near in self._space.neighbours(reference) if near.differing_axes(reference) == ("schedule",)]
        design = {candidate.uid: candidate for candidate in steps[: count // 2]}
        for index, proposal in enumerate(proposals):
            if len(design) == count:
                break
            built = first[index % len(first)]
            donors = {AXES[0]: built}
            # A loop over the layers, as the reference has it, may not be what this architecture can be run by.
            some, all_ = (dict.fromkeys(taken, proposal) for taken in (self._some(AXES[1:]), AXES[1:]))
            candidate = self._cross(reference, donors | some) or self._cross(reference, donors | all_)
            if candidate is not None and candidate.uid not in self._proposed:
                design.setdefault(candidate.uid, candidate)
        return list(design.values())

    def _some(self, from_axes: Sequence[str]) -> list[str]:
        """Each axis as often as not."""
        return [axis for axis in from_axes if self._rng.random() < 0.5]

    def _cross(self, base: Candidate, donors: Mapping[str, Candidate]) -> Candidate | None:
        """`base` with each axis that is named of its donor; None where that is not legal."""
        parents = {axis: donors.get(axis, base).point for axis in AXES}
        mixed = {
            name: value
            for axis, point in parents.items()
            for name, value in point.items()
            if name.partition(".")[0] == axis
        }
        return self._space.candidate(self._space.nearest(mixed))

    def _fit(self) -> None:
        if len(self._trials) == self._fitted:
            return
        for model in self._models:
            model.fit(list(self._trials.values()))
        self._fitted = len(self._trials)

    def _predictions(self, candidates: Sequence[Candidate]) -> dict[str, Prediction]:
        return {name: p for model in self._models for name, p in model.predict(candidates).items()}

    def _screen(self, n: int) -> list[Candidate]:
        self._fit()
        finished = [trial for trial in self._trials.values() if trial.failure is None]
        front = self._front(finished)
        proposals = self._inner.ask(self._pool)
        bases = [trial.candidate for trial, _ in front] or [self._space.reference]
        found = [near for base in bases for near in self._space.neighbours(base)] + list(proposals)
        for proposal in proposals:
            base = bases[self._rng.integers(len(bases))]
            if cross := self._cross(base, dict.fromkeys(self._some(AXES), proposal)):
                found.append(cross)
        self._considered |= {candidate.uid: candidate for candidate in found}
        candidates = [candidate for uid, candidate in self._considered.items() if uid not in self._proposed]
        if not candidates:
            return []
        self._scored |= {candidate.uid for candidate in candidates}
        losses, plausible = self._draw(candidates)
        known, losses = _to_scale(np.array([row for _, row in front]).reshape(-1, losses.shape[2]), losses)
        seconds = self._seconds(candidates)
        # Most proposals are dominated in nearly every draw; only the rest are worth an exact volume.
        worth = _undominated(losses, plausible, known).mean(axis=0) / seconds
        order = np.argsort(-worth, kind="stable")
        self._considered = {candidates[index].uid: candidates[index] for index in order[:_REMEMBERED]}
        kept = order[:_EXACT]
        candidates = [candidates[index] for index in kept]
        losses, plausible, seconds = losses[:, kept], plausible[:, kept], seconds[kept]
        architectures = np.array([candidate.key("architecture") for candidate in candidates])
        untrained = ~np.isin(architectures, list(self._trained))
        chosen, barred = [], np.zeros(len(candidates), dtype=bool)
        while len(chosen) < n and not barred.all():
            gain = np.where(barred, -np.inf, _mean_gain(losses, plausible, known) / seconds)
            best = int(gain.argmax())
            chosen.append(best)
            # What one candidate shows of its architecture is to be known before the next of it is chosen.
            barred |= architectures == architectures[best]
            # The next is chosen as if this one had come out as expected.
            known = np.vstack([known, losses[:, best].mean(axis=0)])
            if untrained[best]:
                barred |= untrained  # and of one training, before the next
        return [candidates[index] for index in chosen]

    @property
    def _trained(self) -> dict[str, Trial]:
        """The trial that trained each architecture, which is its first."""
        return {t.candidate.key("architecture"): t for t in reversed(self._trials.values()) if "quality" in t.seconds}

    def _front(self, trials: Sequence[Trial]) -> list[tuple[Trial, np.ndarray]]:
        rows = [(trial, self._problem.losses(trial.values, self._reference)) for trial in trials]
        complete = [
            (trial, row)
            for trial, row in rows
            if row is not None and self._problem.excess(trial.values, self._reference) == 0
        ]
        if not complete:
            return []
        return [complete[index] for index in pareto.front(np.array([row for _, row in complete]))]

    def _draw(self, candidates: Sequence[Candidate]) -> tuple[np.ndarray, np.ndarray]:
        """Losses [draws, n, objectives], and whether each draw keeps the constraints [draws, n]."""
        predictions = self._predictions(candidates)
        drawn = {name: p.quantile(self._rng.standard_normal((_DRAWS, 1))) for name, p in predictions.items()}
        objectives, reference = self._problem.objectives, self._reference
        losses = np.full((_DRAWS, len(candidates), len(objectives)), LOSS_LIMIT)
        for index, objective in enumerate(objectives):
            if objective.metric in drawn:
                losses[:, :, index] = objective.loss(drawn[objective.metric], reference[objective.metric])
        plausible = np.ones(losses.shape[:2], dtype=bool)
        for constraint in self._problem.constraints:
            if constraint.reads <= drawn.keys():
                plausible &= constraint.holds(drawn, reference)
        return losses, plausible

    def _seconds(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """What each will cost, from what trials cost so far.

        Only a new schedule costs no quality, and one of an architecture that is known no training. A training costs by
        the model's size, and is shared among as many candidates as trainings served so far.
        """
        trials, trained = list(self._trials.values()), self._trained
        base = np.mean([sum(s for stage, s in t.seconds.items() if stage not in _NOT_REPEATED) for t in trials])
        evaluated = {trial.candidate.quality_axes_key for trial in trials}
        trainers = {trial.uid for trial in trained.values()}
        others = [t.seconds["quality"] for t in trials if "quality" in t.seconds and t.uid not in trainers]
        again = float(np.mean(others)) if others else 0.0
        training_s = sum(trial.seconds["quality"] for trial in trained.values())
        parameters = sum(axes.dense_shape(trial.candidate).parameters for trial in trained.values())
        each = training_s / max(parameters, 1) * len(trained) / len(trials)

        def quality_s(candidate: Candidate) -> float:
            if candidate.quality_axes_key in evaluated:
                return 0.0
            if candidate.key("architecture") in trained:
                return again
            return each * axes.dense_shape(candidate).parameters

        return np.array([base + quality_s(candidate) for candidate in candidates])


def _to_scale(front: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with each objective's range over the front as the unit, from 0 at its best to 1 at its worst.

    Else the objective whose limit lies farthest from the front would rule: of the fastest point's latency a tenth
    would weigh more than all that there is to gain in bits per byte.
    """
    if len(front) == 0:
        return front, losses / LOSS_LIMIT
    low = front.min(axis=0)
    span = np.maximum(front.max(axis=0) - low, _LEAST_SPAN)
    return (front - low) / span, (losses - low) / span


def _undominated(losses: np.ndarray, plausible: np.ndarray, front: np.ndarray) -> np.ndarray:
    """[draws, n]: where a candidate keeps the constraints and nothing of `front` is as good in everything."""
    inside = plausible & (losses < _LIMIT).all(axis=2)
    for row in front:
        inside &= (losses < row).any(axis=2)
    return inside


def _mean_gain(losses: np.ndarray, plausible: np.ndarray, front: np.ndarray) -> np.ndarray:
    """The mean over the draws of how much hypervolume each candidate [n] would add to `front`."""
    before = pareto.hypervolume(front, _LIMIT)
    gains = np.zeros(losses.shape[:2])
    for draw, index in zip(*np.nonzero(_undominated(losses, plausible, front)), strict=True):
        gains[draw, index] = pareto.hypervolume(np.vstack([front, losses[draw, index]]), _LIMIT) - before
    return gains.mean(axis=0)
