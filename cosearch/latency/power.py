"""What a token costs in energy where nobody counts it: latency times the power that the chip is expected to draw.

That lies between what it draws idle and its limit, by how busy memory and arithmetic are. Few figures of it are
published, and they differ: of their limits, an A100 and an H100 drew 0.17 and 0.22 in short kernels (medians of
HW-GPT-Bench, https://arxiv.org/abs/2405.10299), an H200 0.20 to 0.43 in decode steps (https://arxiv.org/abs/2605.11999),
and TPUs of v4 0.47 at least and 0.89 on average (https://cloud.google.com/tpu/docs/v4).
"""

from collections.abc import Iterable, Sequence

from cosearch.core.candidate import Candidate
from cosearch.core.metric import Metric, predicted
from cosearch.core.problem import Problem
from cosearch.core.workload import OperatingPoint
from cosearch.latency import roofline
from cosearch.latency.features import work

_IDLE, _MEMORY, _ARITHMETIC = 0.15, 0.35, 0.7
"""Parts of the limit: what is drawn in any case, and what busy memory and arithmetic draw beside it."""
_MODEL = "power 2"
_WITHIN = 2.5
"""Nine of ten powers are expected within this factor either way; all that is cited above are."""


def energy(candidate: Candidate, problem: Problem, latencies: Sequence[Metric]) -> Metric:
    """`energy_j`, predicted with a 90 % interval, of a candidate that takes `latencies` seconds a token at each of the
    workload's operating points, measured or predicted. The target's `power_w` must be known.

    The interval takes latency and power to be off to the same side at once, and the chip never to exceed its limit.
    """
    points, limit_w = problem.workload.points, problem.target.power_w
    assert limit_w is not None
    low = middle = high = 0.0
    for point, latency in zip(points, latencies, strict=True):
        share = _share(candidate, problem, point, latency.value)
        least_s, most_s = latency.interval or (latency.value, latency.value)
        # A token of each sequence is made in that time.
        joules = point.weight * limit_w / point.batch / sum(point.weight for point in points)
        low += joules * least_s * share / _WITHIN
        middle += joules * latency.value * share
        high += joules * most_s * min(share * _WITHIN, 1.0)
    return predicted("energy_j", middle, (low, high), model(latency.model for latency in latencies))


def model(latencies: Iterable[str]) -> str:
    """The name of what predicts energy from latencies that these models predicted; those that were measured have
    none."""
    return "; ".join([_MODEL, *sorted({one for one in latencies if one})])


def _share(candidate: Candidate, problem: Problem, point: OperatingPoint, latency_s: float) -> float:
    """Of the limit, what is drawn while a token takes `latency_s`."""
    target, run_s = problem.target, latency_s * point.tokens / point.batch
    reading = work(candidate, point).read_bytes / target.bandwidth_bytes_per_s / run_s
    computing = roofline.arithmetic_s(candidate, point, target) / run_s
    return min(_IDLE + _MEMORY * min(reading, 1.0) + _ARITHMETIC * min(computing, 1.0), 1.0)
