"""How wrong an operation model is on chips that it never saw: what ships beside a model, and what studies print."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
from scipy.stats import kendalltau

from cosearch.core.metric import Z90
from cosearch.latency.table_model import Training
from cosearch.latency.tables import Measured

_POOL = 500
"""Rows of the target that shots are chosen from; it is tested on all others."""


def leave_out(training: Training, target: Measured, shots: Sequence[int], seeds: int) -> Iterator[dict[str, Any]]:
    """For each number of shots, how well `target` is predicted by what was learnt without its whole family.

    `mape` is the mean of |predicted / measured - 1|, `tau` Kendall's, `coverage` the part that 90 % intervals hold, and
    `width` by which factor the middle one of these reaches up and down; means over so many pools that shots are
    chosen from.
    """
    model = training.model({training.families[target.chip.name]})
    function = model.function(target.operations, target.chip)
    logarithms = np.log(target.latency_s)
    found: dict[int, list[dict[str, float]]] = {count: [] for count in shots}
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(logarithms))
        pool, rest = order[:_POOL], order[_POOL:]
        chosen = model.prior.choose(function, pool, max(shots))
        for count, figures in found.items():
            taken = chosen[:count]
            mean, deviation = model.prior.adapt(function, taken, logarithms[taken]).predict(rest)
            error = mean - logarithms[rest]
            figures.append(
                {
                    "mape": float(np.abs(np.expm1(error)).mean()),
                    "tau": float(cast(tuple[float, float], kendalltau(mean, logarithms[rest]))[0]),
                    "coverage": float((np.abs(error) <= Z90 * deviation).mean()),
                    "width": float(np.exp(Z90 * np.median(deviation))),
                }
            )
    for count, figures in found.items():
        means = {key: round(float(np.mean([one[key] for one in figures])), 4) for key in figures[0]}
        yield {"op": target.operations.kind, "target": target.chip.name, "shots": count, **means}
