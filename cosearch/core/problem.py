"""The problem: what is optimised, for which chip and traffic, and under which constraints."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cosearch.core.errors import UserError
from cosearch.core.expression import Expression
from cosearch.core.metric import UNITS
from cosearch.core.registry import did_you_mean
from cosearch.core.target import Target
from cosearch.core.workload import Workload

Goal = Literal["minimize", "maximize"]

LOSS_LIMIT = 2.0
"""The reference point of the hypervolume in every objective: twice the plain reference's value for a metric that is
minimised, 0 for one that is maximised."""


@dataclass(frozen=True)
class Objective:
    """`minimize latency_s` or `maximize recall_accuracy`."""

    metric: str
    goal: Goal

    @classmethod
    def parse(cls, text: str, where: str = "objectives") -> "Objective":
        """Raises UserError where the goal or the metric is unknown."""
        goal, _, metric = str(text).strip().partition(" ")
        if goal not in ("minimize", "maximize"):
            raise UserError(f"{where}: {text!r} must read 'minimize METRIC' or 'maximize METRIC'")
        _check_metric(metric.strip(), where)
        return cls(metric.strip(), goal)

    def loss(self, value: Any, reference: float) -> Any:
        """A value or an array of them relative to the reference's, as a loss: 1 for the reference, lower is better."""
        ratio = value / reference if reference else float("inf")
        return ratio if self.goal == "minimize" else LOSS_LIMIT - ratio

    def __str__(self) -> str:
        return f"{self.goal} {self.metric}"


_BOUNDS = ("<=", ">=")


@dataclass(frozen=True)
class Constraint:
    """`bits_per_byte <= 1.02 * reference`: a metric, a bound's side, and an expression in which `reference`
    is the same metric of the reference trial and other metrics are the trial's own."""

    metric: str
    side: Literal["<=", ">="]
    bound: Expression

    @classmethod
    def parse(cls, text: str, where: str = "constraints") -> "Constraint":
        """Raises UserError where the metric is unknown or the text is no such bound."""
        for side in _BOUNDS:
            metric, found, bound = str(text).partition(side)
            if found:
                _check_metric(metric.strip(), where)
                expression = Expression(bound.strip(), where)
                for name in expression.names - {"reference"}:
                    _check_metric(name, where)
                # What kind of thing an expression gives does not depend on the values, so any will do here.
                probe = expression(dict.fromkeys(expression.names, 0.7548776662466927))
                if not isinstance(probe, int | float) or isinstance(probe, bool):
                    break
                return cls(metric.strip(), side, expression)
        raise UserError(f"{where}: {text!r} must read 'METRIC <= EXPRESSION' or 'METRIC >= EXPRESSION'")

    @property
    def reads(self) -> frozenset[str]:
        """The metrics it needs of a trial."""
        return frozenset({self.metric}) | (self.bound.names - {"reference"})

    def excess(self, values: Mapping[str, float], reference: Mapping[str, float]) -> float:
        """By what fraction of the bound it is broken; 0 where it holds, infinity where a metric is missing."""
        needs_reference = "reference" in self.bound.names
        if not self.reads <= values.keys() or (needs_reference and self.metric not in reference):
            return float("inf")
        bound, over = self._over(values, reference)
        return float(max(over, 0.0) / max(abs(bound), 1e-12))

    def holds(self, values: Mapping[str, Any], reference: Mapping[str, float]) -> Any:
        """Whether it holds, for numbers or elementwise for arrays."""
        return self._over(values, reference)[1] <= 0

    def _over(self, values: Mapping[str, Any], reference: Mapping[str, float]) -> tuple[Any, Any]:
        bound = self.bound({**values, "reference": reference.get(self.metric, float("nan"))})
        return bound, values[self.metric] - bound if self.side == "<=" else bound - values[self.metric]

    def __str__(self) -> str:
        return f"{self.metric} {self.side} {self.bound.text}"


@dataclass(frozen=True)
class Problem:
    """Target, workload, objectives and constraints: the only thing being optimised."""

    target: Target
    workload: Workload
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...] = ()

    @property
    def reads(self) -> frozenset[str]:
        """The metrics that it needs of a trial."""
        return frozenset(o.metric for o in self.objectives).union(*(one.reads for one in self.constraints))

    def losses(self, values: Mapping[str, float], reference: Mapping[str, float]) -> np.ndarray | None:
        """One loss an objective (`Objective.loss`), or None where a metric of the trial or of the reference is
        missing or not finite."""
        if not {objective.metric for objective in self.objectives} <= values.keys() & reference.keys():
            return None
        losses = np.array([o.loss(values[o.metric], reference[o.metric]) for o in self.objectives])
        return losses if np.isfinite(losses).all() else None

    def excess(self, values: Mapping[str, float], reference: Mapping[str, float]) -> float:
        """The sum over the constraints of how far each is broken; 0 for a feasible point."""
        return sum(constraint.excess(values, reference) for constraint in self.constraints)

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target.to_json(),
            "workload": self.workload.to_json(),
            "objectives": [str(objective) for objective in self.objectives],
            "constraints": [str(constraint) for constraint in self.constraints],
        }


def _check_metric(name: str, where: str) -> None:
    if name not in UNITS:
        raise UserError(f"{where}: unknown metric {name!r}{did_you_mean(name, tuple(UNITS))}")
