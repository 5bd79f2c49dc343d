"""The roofline (Williams et al. 2009): no run is faster than its bytes over the bandwidth or its operations over the
peak. It is the prior mean of the learned model, and the floor below which a measurement is not believed.
"""

from cosearch.core.candidate import Candidate
from cosearch.core.target import Target
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.latency.features import Work, work
from cosearch.latency.operations import Operation, operations
from cosearch.precision import Precision
from cosearch.precision.quantized import multiplied

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


def peak_flops_per_s(target: Target, *dtypes: str) -> float:
    """What the target multiplies of the first of these dtypes that it has a peak for; where it has none for any, the
    least of all: what it does not multiply, it emulates."""
    peaks = target.peak_flops_per_s
    return next((peaks[dtype] for dtype in dtypes if dtype in peaks), min(peaks.values()))


def multiplied_s(operation: Operation, target: Target, dtype: str) -> float:
    """Seconds that an operation of a model in `dtype` takes at the peak of what it multiplies."""
    inputs = operation.product.inputs if operation.product else "as_is"
    return operation.flops / peak_flops_per_s(target, multiplied(inputs, dtype), dtype)


def arithmetic_s(candidate: Candidate, point: OperatingPoint, target: Target) -> float:
    """Seconds that all operations of one run take so."""
    dtype = Precision.of(candidate.precision).activations
    return sum(multiplied_s(operation, target, dtype) for operation in operations(candidate, point))


def latency_s(candidate: Candidate, workload: Workload, target: Target) -> float:
    """Seconds a token with all data read from memory, and each operation's overhead: where the learned model starts."""
    total = 0.0
    for point in workload.points:
        done = work(candidate, point)
        read_s = done.read_bytes / target.bandwidth_bytes_per_s
        run_s = max(read_s, arithmetic_s(candidate, point, target)) + done.products * target.overhead_s
        total += point.weight * run_s / (point.tokens / point.batch)
    return total / sum(point.weight for point in workload.points)
