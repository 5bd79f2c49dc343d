"""What a candidate would take on a chip that is not here: predicted from what its compiler made of it, never measured.

A roofline over the compiled program: each kernel starts, and takes as long as its bytes after fusion; products take as
long as their operations do at the peak, whatever hides behind what. On GPUs, products and attention that the models of
operations know (`table_model.py`) take what these say instead; a calibration that was made where such a GPU is
(`calibration.py`) adapts them to it.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cosearch.core.candidate import Candidate
from cosearch.core.metric import Metric, predicted
from cosearch.core.problem import Problem
from cosearch.core.target import Target
from cosearch.core.workload import OperatingPoint
from cosearch.latency import pretrained
from cosearch.latency.calibration import Calibration, Subject, stored, subjects
from cosearch.latency.features import work
from cosearch.latency.hlo import HloFeatures
from cosearch.latency.operations import Operation, operations
from cosearch.latency.pretrained import Pretrained
from cosearch.latency.tables import KINDS, Operations
from cosearch.precision import Precision
from cosearch.schedule import Schedule

_WITHIN = 2.5
"""Nine of ten latencies are expected within this factor either way: bandwidths are reached in part, kernels overlap,
and some start later than others. Only a calibration narrows it, for what it tells of: the tables that models learnt
from are of other kernels than XLA's, which on an H200 took 0.7 to 11 times as long."""
_Z90 = 1.645


def estimate(candidate: Candidate, problem: Problem, hlo: Sequence[HloFeatures]) -> Metric:
    """`latency_s`, predicted with a 90 % interval, of a candidate that was compiled for every operating point of the
    problem's workload, to programs of these features."""
    target, points = problem.target, problem.workload.points
    dtype = Precision.of(candidate.precision).activations
    peak = target.peak_flops_per_s.get(dtype, min(target.peak_flops_per_s.values()))
    known = _known(target)
    total = logarithm = 0.0
    for point, program in zip(points, hlo, strict=True):
        steps = min(Schedule.of(candidate.schedule).steps, point.context) if point.phase == "decode" else 1
        moved_s = program.moved_bytes / target.bandwidth_bytes_per_s
        multiplied_s = steps * work(candidate, point).flops / peak
        run_s = max(moved_s, multiplied_s) + program.launches * target.overhead_s
        learnt = known.of(candidate, point, target, peak)
        run_s = max(run_s + steps * (learnt.seconds - learnt.roofline_s), steps * learnt.seconds, multiplied_s)
        share_s = point.weight * run_s / steps / (point.tokens / point.batch)
        sure = steps * learnt.seconds / run_s if known.calibration is not None else 0.0
        logarithm += share_s * (sure * _Z90 * learnt.deviation + (1 - sure) * np.log(_WITHIN))
        total += share_s
    seconds, factor = total / sum(point.weight for point in points), float(np.exp(logarithm / total))
    return predicted("latency_s", seconds, (seconds / factor, seconds * factor), known.name)


@dataclass(frozen=True)
class _Learnt:
    """What models say of the operations that they know: their `seconds`, what the roofline says of the same, and the
    deviation of the logarithm."""

    seconds: float = 0.0
    roofline_s: float = 0.0
    deviation: float = 0.0


@dataclass(frozen=True)
class _Known:
    """The models of operations on a chip, and its calibration; of none but GPUs there are any."""

    subjects: tuple[Subject, ...]
    calibration: Calibration | None
    name: str

    def of(self, candidate: Candidate, point: OperatingPoint, target: Target, peak: float) -> _Learnt:
        """What is learnt of one step of an operating point."""
        if not self.subjects:
            return _Learnt()
        found: dict[str, list[tuple[Operation, tuple[object, ...]]]] = defaultdict(list)
        for operation in operations(candidate, point):
            kind, sizes = _as_measured(operation)
            if kind is not None:
                found[kind].append((operation, sizes))
        seconds = roofline_s = spread = 0.0
        for subject in self.subjects:
            own = found[subject.kind]
            if not own:
                continue
            columns = zip(KINDS[subject.kind].columns, zip(*(sizes for _, sizes in own), strict=True), strict=True)
            told = Operations(subject.kind, {name: np.array(values) for name, values in columns})
            inside = np.flatnonzero(subject.knows(told))
            if not len(inside):
                continue
            own = [own[place] for place in inside]
            posterior, rows = subject.adapted(self.calibration, told[inside])
            mean, deviation = posterior.predict(rows)
            counts = np.array([operation.count for operation, _ in own])
            each_s = counts * np.exp(mean)
            seconds += float(each_s.sum())
            spread += float((each_s * deviation).sum())
            for operation, _ in own:
                busy_s = max(operation.read_bytes / target.bandwidth_bytes_per_s, operation.flops / peak)
                roofline_s += busy_s + operation.count * target.overhead_s
        return _Learnt(seconds, roofline_s, spread / seconds if seconds else 0.0)


def _known(target: Target) -> _Known:
    return _of_gpu(target) if target.platform == "gpu" else _Known((), None, "roofline of the compiled program")


@functools.lru_cache(1)  # read once, not for each of a search's candidates
def _models(name: str) -> tuple[Pretrained, Calibration | None]:
    return pretrained.load(), stored(name)


def _of_gpu(target: Target) -> _Known:
    models, calibration = _models(target.name)
    calibrated = "not calibrated" if calibration is None else f"calibrated by {len(calibration.shots)} operations"
    return _Known(tuple(subjects(target, models)), calibration, f"{models.name}, {calibrated}")


def _as_measured(operation: Operation) -> tuple[str | None, tuple[object, ...]]:
    """The kind of table that an operation is in, and its columns there; none where it is in no table."""
    product, attention = operation.product, operation.attention
    if product is not None and product.compression is None and product.dtype == "bfloat16":
        narrow = product.format == product.inputs == "float8_e4m3"
        if narrow or (product.format == "bfloat16" and product.inputs == "as_is"):
            return "gemm", ("fp8" if narrow else "bfloat16", product.tokens, product.columns, product.rows)
    if attention is not None and attention.format == attention.dtype == "bfloat16":
        sizes = (attention.batch, attention.slots, attention.heads, attention.kv_heads, attention.head_dim)
        return "attn_generation", sizes
    return None, ()
