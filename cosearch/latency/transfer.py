"""Adapting to a chip from few measurements: a Gaussian process whose prior is learnt from chips that were measured.

What is modelled is the logarithm of a latency over the rows of a table (operations, or whole models): a `mean` that was
predicted without the chip, plus `Block`s, each of which is one way in which a chip may differ from that: a factor on
all, effects of known features, what other chips do differently, a smooth function of the sizes. How far chips differ in
each way, how noisy they are, and how much too sure the whole is, is learnt by treating each measured chip as if it were
new (`Prior.fit`). Everything else is closed-form: which rows to measure, the posterior, the intervals.

To add a way to differ, write a class with the methods of `Block`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import digamma, gammaln

from cosearch.core.gaussian_process import matern, squared_distances
from cosearch.core.metric import Z90

_NOISES = np.geomspace(0.001, 0.128, 8)
_MULTIPLIERS = (0.5, 1.0, 2.0, 4.0)
_TAIL = 4.0
"""Degrees of freedom of the noise: a measurement that was disturbed must not count like the others (Student's t)."""
_ROWS = 200
"""Of each measured chip's, that the prior is learnt from."""
_EVIDENCE_ROWS = 60
_NEGLIGIBLE = 1e-3
"""A cell of less than this part of the likeliest one's weight is left out."""
_CHUNK = 20_000


class Block(Protocol):
    """One way in which chips differ: a covariance [a, b] between rows, of variance about 1.

    `amplitude` is the deviation to expect before anything is learnt. Where it is not `learnt` it stays.
    """

    @property
    def name(self) -> str: ...

    @property
    def amplitude(self) -> float: ...

    @property
    def learnt(self) -> bool: ...

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray: ...

    def variance(self, rows: np.ndarray) -> np.ndarray:
        """The diagonal of the covariance of `rows` with themselves."""
        ...


@dataclass(frozen=True)
class Linear:
    """Independent effects of features, whose values are the `columns` [N, f]."""

    name: str
    columns: np.ndarray
    amplitude: float = 0.1
    learnt: bool = True

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self.columns[a] @ self.columns[b].T

    def variance(self, rows: np.ndarray) -> np.ndarray:
        return np.square(self.columns[rows]).sum(axis=1)


@dataclass(frozen=True)
class Smooth:
    """A smooth function (Matérn 5/2) of `coordinates` [N, d], in units of the distance over which it changes."""

    name: str
    coordinates: np.ndarray
    amplitude: float = 0.1
    learnt: bool = True

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return matern(squared_distances(self.coordinates[a], self.coordinates[b]))

    def variance(self, rows: np.ndarray) -> np.ndarray:
        return np.ones(len(rows))


@dataclass(frozen=True)
class Function:
    """The logarithm of a chip's latency over N rows before the chip is measured: its `mean` [N], and how it may
    differ."""

    mean: np.ndarray
    blocks: tuple[Block, ...]


def principal(functions: np.ndarray) -> np.ndarray:
    """Columns [N, k] whose outer product is the mean of the outer products of `functions` [chips, N]: what those chips
    do differently, as effects for `Linear`."""
    values, vectors = np.linalg.eigh(functions @ functions.T / functions.shape[1] / len(functions))
    kept = values > 1e-8
    return functions.T @ vectors[:, kept] / np.sqrt(len(functions))


@dataclass(frozen=True)
class _Cell:
    """One guess at a chip: by how much all learnt amplitudes are larger for it, and the noise of its measurements."""

    multiplier: float
    noise: float


_CELLS = tuple(_Cell(multiplier, noise) for multiplier in _MULTIPLIERS for noise in _NOISES)


@dataclass(frozen=True)
class Prior:
    """What measured chips tell of one that is not measured yet.

    `amplitudes` are by block; `weights` [cells] are how likely each guess at the chip's multiplier and noise is;
    `stretch` is, by the number of measurements, the factor on deviations by which 90 % intervals held 90 % of each
    measured chip that was treated as new.
    """

    amplitudes: Mapping[str, float]
    weights: tuple[float, ...]
    stretch: Mapping[int, float]

    @classmethod
    def fit(
        cls,
        measured: Sequence[tuple[Function, np.ndarray, np.ndarray]],
        shots: Sequence[int],
        pool: int = 300,
        seed: int = 0,
    ) -> "Prior":
        """Learn from chips that were `measured`: each as a function that was made without it, rows [n] of it, and the
        logarithms of the latencies of these rows [n].

        Intervals are calibrated for each number of `shots`, chosen from `pool` rows, and for none. Where no chip was
        measured, amplitudes are what blocks expect, and intervals are not calibrated.
        """
        unlearnt = cls({}, tuple(np.full(len(_CELLS), 1 / len(_CELLS))), {})
        if not measured:
            return unlearnt
        rng = np.random.default_rng(seed)
        drawn = []
        for function, rows, values in measured:
            one = rng.choice(len(rows), min(_ROWS, len(rows)), replace=False)
            drawn.append((function, rows[one], values[one] - function.mean[rows[one]]))
        blocks = measured[0][0].blocks
        learnt = [block.name for block in blocks if block.learnt]
        fixed = {block.name: block.amplitude for block in blocks if not block.learnt}
        covariances = [{block.name: block(rows, rows) for block in function.blocks} for function, rows, _ in drawn]
        start = np.log([block.amplitude for block in blocks if block.learnt])

        def loss(logarithms: np.ndarray) -> tuple[float, np.ndarray]:
            amplitudes = fixed | dict(zip(learnt, np.exp(logarithms), strict=True))
            cost, slope = 0.5 * float(np.square(logarithms - start).sum()), logarithms - start
            for own, (_, _, values) in zip(covariances, drawn, strict=True):
                scaled = {name: amplitudes[name] ** 2 * own[name] for name in own}
                evidence, gradient = _best_evidence(np.asarray(sum(scaled.values())), values)
                cost -= evidence / np.sqrt(len(values))
                slopes = [2 * np.vdot(gradient, scaled[name]) for name in learnt]
                slope = slope - np.array(slopes) / np.sqrt(len(values))
            return cost, slope

        bounds = [(-6.0, 2.0)] * len(start)
        found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 30})
        amplitudes = fixed | {name: float(np.exp(value)) for name, value in zip(learnt, found.x, strict=True)}
        flat = replace(unlearnt, amplitudes=amplitudes)
        counts = np.full(len(_CELLS), 0.05)
        for function, rows, values in drawn:
            few = slice(0, _EVIDENCE_ROWS)
            evidence = np.array([part.evidence for part in flat._parts(function, rows[few], values[few])])
            likely = np.exp(evidence - evidence.max())
            counts += likely / likely.sum()
        prior = replace(flat, weights=tuple(counts / counts.sum()))
        return replace(prior, stretch=prior._calibrate(measured, shots, pool, rng))

    def _calibrate(
        self,
        measured: Sequence[tuple[Function, np.ndarray, np.ndarray]],
        shots: Sequence[int],
        pool: int,
        rng: np.random.Generator,
    ) -> dict[int, float]:
        errors: dict[int, list[np.ndarray]] = {count: [] for count in (0, *shots)}
        for function, rows, values in measured:
            order = rng.permutation(len(rows))
            offered, others = order[:pool], order[pool : pool + 4 * _ROWS]
            if not len(others):
                others = order
            known = dict(zip(rows.tolist(), range(len(rows)), strict=True))
            chosen = self.choose(function, rows[offered], min(max(errors), len(offered)))
            for count in errors:
                taken = chosen[:count]
                prediction = self.adapt(function, taken, values[[known[row] for row in taken.tolist()]])
                mean, deviation = prediction.predict(rows[others])
                errors[count].append(np.abs(values[others] - mean) / deviation)
        # Not below 1: a new chip may be less like those that were measured than they are like each other.
        return {count: max(float(np.quantile(np.concatenate(each), 0.9)) / Z90, 1.0) for count, each in errors.items()}

    def choose(self, function: Function, pool: np.ndarray, count: int) -> np.ndarray:
        """The `count` rows of `pool` to measure, one after the other those that leave the least mean variance over it
        (Seo et al. 2000)."""
        noise = float(np.exp(np.dot(self.weights, [2 * np.log(cell.noise) for cell in _CELLS])))
        covariance = self._covariance(function, 1.0, pool, pool)
        taken: list[int] = []
        for _ in range(min(count, len(pool))):
            gain = np.square(covariance).sum(axis=0) / (np.diag(covariance) + noise)
            gain[taken] = -np.inf
            best = int(np.argmax(gain))
            taken.append(best)
            column = covariance[:, best]
            covariance = covariance - np.outer(column, column) / (column[best] + noise)
        return pool[taken]

    def adapt(self, function: Function, rows: np.ndarray, values: np.ndarray) -> "Posterior":
        """What is known of the chip once `rows` [n] of it were measured, as the logarithms of latencies `values` [n];
        n may be 0."""
        parts = self._parts(function, rows, values - function.mean[rows])
        logarithms = np.log(self.weights) + [part.evidence for part in parts]
        weights = np.exp(logarithms - logarithms.max())
        weights[weights < _NEGLIGIBLE] = 0.0
        nearest = min(self.stretch, key=lambda count: abs(np.log1p(count) - np.log1p(len(rows))), default=None)
        stretch = 1.0 if nearest is None else self.stretch[nearest]
        return Posterior(self, function, rows, tuple(parts), weights / weights.sum(), stretch)

    def _parts(self, function: Function, rows: np.ndarray, values: np.ndarray) -> list["_Part"]:
        covariances = {multiplier: self._covariance(function, multiplier, rows, rows) for multiplier in _MULTIPLIERS}
        return [_condition(covariances[cell.multiplier], values, cell) for cell in _CELLS]

    def _covariance(self, function: Function, multiplier: float, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        scales = self._scales(function, multiplier)
        return np.asarray(sum(scales[block.name] * block(a, b) for block in function.blocks))

    def _scales(self, function: Function, multiplier: float) -> dict[str, float]:
        return {
            block.name: (self.amplitudes.get(block.name, block.amplitude) * (multiplier if block.learnt else 1.0)) ** 2
            for block in function.blocks
        }


@dataclass(frozen=True)
class _Part:
    """The measurements under one guess: their covariance's factor, weights of the mean, and the logarithm of how
    likely they are."""

    cell: _Cell
    factor: np.ndarray
    solved: np.ndarray
    evidence: float


@dataclass(frozen=True)
class Posterior:
    """A chip after few measurements: a mixture of Gaussian processes, one for each guess that is left."""

    prior: Prior
    function: Function
    rows: np.ndarray
    parts: tuple[_Part, ...]
    weights: np.ndarray
    stretch: float

    def predict(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [n] of the logarithms of the latencies that would be measured of `rows` [n]."""
        chunks = [self._predict(rows[first : first + _CHUNK]) for first in range(0, len(rows), _CHUNK)]
        means, deviations = zip(*chunks, strict=True)
        return np.concatenate(means), np.concatenate(deviations)

    def _predict(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        crosses = {block.name: block(self.rows, rows) for block in self.function.blocks}
        variances = {block.name: block.variance(rows) for block in self.function.blocks}
        first, second = np.zeros(len(rows)), np.zeros(len(rows))
        for part, weight in zip(self.parts, self.weights, strict=True):
            if not weight:
                continue
            scales = self.prior._scales(self.function, part.cell.multiplier)
            cross = np.asarray(sum(scales[name] * crosses[name] for name in crosses))
            variance = np.asarray(sum(scales[name] * variances[name] for name in variances))
            mean = cross.T @ part.solved
            left = variance - np.square(solve_triangular(part.factor, cross, lower=True)).sum(axis=0)
            first += weight * mean
            second += weight * (mean**2 + np.maximum(left, 0.0) + part.cell.noise**2 * _TAIL / (_TAIL - 2))
        deviation = np.sqrt(np.maximum(second - first**2, 1e-12))
        return self.function.mean[rows] + first, self.stretch * deviation


def _condition(covariance: np.ndarray, values: np.ndarray, cell: _Cell) -> _Part:
    """Gaussian values with Student's noise, each of which is Gaussian noise of its own precision; the precisions are
    found by variational inference (Tipping and Lawrence 2005), and the evidence is its lower bound."""
    count = len(values)
    inverse, correction = np.ones(count), 0.0
    for last in (False, False, False, True):
        total = covariance + np.diag(cell.noise**2 * inverse)
        factor = np.asarray(cholesky(total, lower=True)) if count else total
        solved = cho_solve((factor, True), values) if count else values
        if last or not count:
            break
        gain = cho_solve((factor, True), covariance)
        left = np.maximum(np.diag(covariance) - np.einsum("ij,ij->j", covariance, gain), 0.0)
        square = (np.square(values - covariance @ solved) + left) / cell.noise**2
        prior, shape, rate = _TAIL / 2, (_TAIL + 1) / 2, (_TAIL + square) / 2
        inverse = rate / shape
        divergence = (shape - prior) * digamma(shape) - gammaln(shape) + gammaln(prior)
        divergence = divergence + prior * np.log(rate / prior) + shape * (prior - rate) / rate
        correction = float(np.sum(0.5 * (digamma(shape) - np.log(shape)) - divergence))
    evidence = -0.5 * float(values @ solved) - float(np.log(np.diag(factor)).sum()) + correction if count else 0.0
    return _Part(cell, factor, solved, evidence - 0.5 * count * float(np.log(2 * np.pi)))


def _best_evidence(covariance: np.ndarray, values: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest logarithm of the evidence of `values` [n] over Gaussian noises, but for a constant, and its gradient
    [n, n] with respect to the covariance."""
    eigenvalues, vectors = np.linalg.eigh(covariance)
    total = np.maximum(eigenvalues, 0.0) + np.geomspace(0.0005, 0.256, 19)[:, None] ** 2
    rotated = vectors.T @ values
    evidence = -0.5 * (rotated**2 / total + np.log(total)).sum(axis=1)
    best = int(np.argmax(evidence))
    solved = vectors @ (rotated / total[best])
    return float(evidence[best]), 0.5 * (np.outer(solved, solved) - (vectors / total[best]) @ vectors.T)
