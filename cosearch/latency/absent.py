"""What a candidate would take on a chip that is not here: predicted from what its compiler made of it, never measured.

A roofline over the compiled program: each kernel starts, and takes as long as its bytes after fusion; products take as
long as their operations do at the peak, whatever hides behind what.
"""

from collections.abc import Sequence

from cosearch.core.candidate import Candidate
from cosearch.core.metric import Metric, predicted
from cosearch.core.problem import Problem
from cosearch.latency.features import work
from cosearch.latency.hlo import HloFeatures
from cosearch.precision import Precision
from cosearch.schedule import Schedule

_WITHIN = 2.5
"""Nine of ten latencies are expected within this factor either way: bandwidths are reached in part, kernels overlap,
and some start later than others. Nothing was measured to narrow it."""


def estimate(candidate: Candidate, problem: Problem, hlo: Sequence[HloFeatures]) -> Metric:
    """`latency_s`, predicted with a 90 % interval, of a candidate that was compiled for every operating point of the
    problem's workload, to programs of these features."""
    target, points = problem.target, problem.workload.points
    dtype = Precision.of(candidate.precision).activations
    peak = target.peak_flops_per_s.get(dtype, min(target.peak_flops_per_s.values()))
    total = 0.0
    for point, program in zip(points, hlo, strict=True):
        steps = min(Schedule.of(candidate.schedule).steps, point.context) if point.phase == "decode" else 1
        moved_s = program.moved_bytes / target.bandwidth_bytes_per_s
        multiplied_s = steps * work(candidate, point).flops / peak
        run_s = max(moved_s, multiplied_s) + program.launches * target.overhead_s
        total += point.weight * run_s / steps / (point.tokens / point.batch)
    seconds = total / sum(point.weight for point in points)
    return predicted("latency_s", seconds, (seconds / _WITHIN, seconds * _WITHIN))
