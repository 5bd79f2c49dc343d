"""The roofline (Williams et al. 2009): no run is faster than its bytes over the bandwidth or its operations over the
peak. It is the prior mean of the learned model, and the floor below which a measurement is not believed.
"""

from cosearch.core.candidate import Candidate
from cosearch.core.target import Target
from cosearch.core.workload import Workload
from cosearch.latency.features import Work, work
from cosearch.precision import Precision

_PACKED = 4
"""Kernels may multiply narrower numbers than the model's own, four int8 in the place of one float32 (VNNI, dp4a), which
peaks that were measured with XLA's products do not show."""


def floor_s(work: Work, target: Target, steps: int = 1) -> float:
    """Seconds that each of so many `steps` of one run takes at least, in whatever numbers it multiplies.

    A run starts on cold data; what the chip's caches hold it need not read again in its later steps.
    """
    stays = work.weight_bytes + work.cache_bytes <= target.cache_bytes
    read_bytes = work.read_bytes / (steps if stays else 1)
    fastest = _PACKED * max(target.peak_flops_per_s.values())
    return max(read_bytes / target.bandwidth_bytes_per_s, work.flops / fastest)


def latency_s(candidate: Candidate, workload: Workload, target: Target) -> float:
    """Seconds a token with all data read from memory, and each operation's overhead: where the learned model starts."""
    dtype = Precision.of(candidate.precision).activations
    peak = target.peak_flops_per_s.get(dtype, max(target.peak_flops_per_s.values()))
    total = 0.0
    for point in workload.points:
        done = work(candidate, point)
        read_s = done.read_bytes / target.bandwidth_bytes_per_s
        run_s = max(read_s, done.flops / peak) + done.products * target.overhead_s
        total += point.weight * run_s / (point.tokens / point.batch)
    return total / sum(point.weight for point in workload.points)
