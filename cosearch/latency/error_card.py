"""How wrong an operation model is on chips that it never saw: what ships beside a model, and what studies print.

`scores` are the figures of any prediction with intervals, for studies of other models as well.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
from scipy.stats import kendalltau

from cosearch.core.errors import UserError
from cosearch.core.metric import Z90
from cosearch.latency.table_model import Training
from cosearch.latency.tables import Measured

_POOL = 500
"""Rows of the target that shots are chosen from, or half of fewer than twice as many; it is tested on all others."""
_LEAST_ROWS = 20


def scores(mean: np.ndarray, deviation: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """How well the logarithms of figures [n] are predicted: `mape`, the mean of |predicted / measured - 1|, `tau`,
    Kendall's, and `coverage`, the part that 90 % intervals hold."""
    error = mean - truth
    return {
        "mape": float(np.abs(np.expm1(error)).mean()),
        "tau": float(cast(tuple[float, float], kendalltau(mean, truth))[0]),
        "coverage": float((np.abs(error) <= Z90 * deviation).mean()),
    }


def refuse_few(target: Measured, shots: Sequence[int]) -> None:
    """Raise UserError where a system has too few rows to choose so many shots from half of them."""
    least, count = max(_LEAST_ROWS, 2 * max(shots)), len(target.latency_s)
    if count < least:
        raise UserError(
            f"{target.chip.name}: has {count} rows of {target.operations.kind}; to choose {max(shots)} shots from half "
            f"of them, and to test on the rest, takes at least {least}"
        )


def leave_out(training: Training, target: Measured, shots: Sequence[int], seeds: int) -> Iterator[dict[str, Any]]:
    """For each number of shots, how well `target` is predicted by what was learnt without its whole family.

    Beside `scores`, `width` says by which factor the middle one of its intervals reaches up and down; means over so
    many pools that shots are chosen from.

    Raises:
        UserError: the target has too few rows.
    """
    refuse_few(target, shots)
    model = training.model({training.families[target.chip.name]})
    function = model.function(target.operations, target.chip)
    logarithms = np.log(target.latency_s)
    found: dict[int, list[dict[str, float]]] = {count: [] for count in shots}
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(logarithms))
        pool, rest = np.split(order, [min(_POOL, len(order) // 2)])
        chosen = model.prior.choose(function, pool, max(shots))
        for count, figures in found.items():
            taken = chosen[:count]
            mean, deviation = model.prior.adapt(function, taken, logarithms[taken]).predict(rest)
            width = float(np.exp(Z90 * np.median(deviation)))
            figures.append(scores(mean, deviation, logarithms[rest]) | {"width": width})
    for count, figures in found.items():
        means = {key: round(float(np.mean([one[key] for one in figures])), 4) for key in figures[0]}
        yield {"op": target.operations.kind, "target": target.chip.name, "shots": count, **means}
