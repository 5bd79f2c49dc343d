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
from cosearch.core.metric import Z90, Metric, predicted
from cosearch.core.problem import Problem
from cosearch.core.target import Target
from cosearch.core.workload import OperatingPoint
from cosearch.latency import pretrained, roofline
from cosearch.latency.calibration import Calibration, Subject, gpu_chip, stored, subjects
from cosearch.latency.hlo import HloFeatures
from cosearch.latency.operations import Operation, operations
from cosearch.latency.pretrained import Pretrained
from cosearch.latency.tables import KINDS, Operations
from cosearch.precision import Precision
from cosearch.schedule import Schedule

_MODEL = "roofline 2 of the compiled program"
_WITHIN = 2.5
"""Nine of ten latencies are expected within this factor either way: bandwidths are reached in part, kernels overlap,
and some start later than others. Only a calibration narrows it, for what it tells of: the tables that models learnt
from are of other kernels than XLA's, which on an H200 took 0.6 to 11 times as long. On that H200 27 of 28 whole models
were within it (experiments/gpu_latency)."""


def estimate(candidate: Candidate, problem: Problem, hlo: Sequence[HloFeatures]) -> list[Metric]:
    """`latency_s` at each operating point of the problem's workload, predicted with a 90 % interval, of a candidate
    that was compiled for each, to programs of these features."""
    target, known = problem.target, _known(problem.target)
    found = []
    for point, program in zip(problem.workload.points, hlo, strict=True):
        steps = min(Schedule.of(candidate.schedule).steps, point.context) if point.phase == "decode" else 1
        moved_s = program.moved_bytes / target.bandwidth_bytes_per_s
        multiplied_s = steps * roofline.arithmetic_s(candidate, point, target)
        run_s = max(moved_s, multiplied_s) + program.launches * target.overhead_s
        learnt = known.of(candidate, point, target)
        run_s = max(run_s + steps * (learnt.seconds - learnt.roofline_s), steps * learnt.seconds, multiplied_s)
        sure = steps * learnt.sure_s / run_s
        factor = np.exp(Z90 * steps * learnt.spread_s / run_s + (1 - sure) * np.log(_WITHIN))
        seconds = run_s / steps / (point.tokens / point.batch)
        found.append(predicted("latency_s", seconds, (seconds / factor, seconds * factor), known.name))
    return found


def model(target: Target) -> str:
    """The name of what predicts latencies on a chip that is not here, and of its calibration."""
    return _known(target).name


@dataclass(frozen=True)
class _Learnt:
    """What models say of the operations that they know: their `seconds`, and what the roofline says of the same. Of
    those of kinds that are calibrated, `sure_s` are the seconds, and `spread_s` is their deviation."""

    seconds: float = 0.0
    roofline_s: float = 0.0
    sure_s: float = 0.0
    spread_s: float = 0.0


@dataclass(frozen=True)
class _Known:
    """The models of operations on a chip, and its calibration; of none but GPUs there are any."""

    subjects: tuple[Subject, ...]
    calibration: Calibration | None
    name: str

    def of(self, candidate: Candidate, point: OperatingPoint, target: Target) -> _Learnt:
        """What is learnt of one step of an operating point."""
        if not self.subjects:
            return _Learnt()
        found: dict[str, list[tuple[Operation, tuple[object, ...]]]] = defaultdict(list)
        for operation in operations(candidate, point):
            kind, sizes = _as_measured(operation, point)
            if kind is not None:
                found[kind].append((operation, sizes))
        dtype = Precision.of(candidate.precision).activations
        calibrated = {shot.kind for shot in self.calibration.shots} if self.calibration else set()
        seconds = roofline_s = sure_s = spread_s = 0.0
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
            each_s = np.array([operation.count for operation, _ in own]) * np.exp(mean)
            seconds += float(each_s.sum())
            if subject.kind in calibrated:
                sure_s += float(each_s.sum())
                spread_s += float((each_s * deviation).sum())
            for operation, _ in own:
                read_s = operation.read_bytes / target.bandwidth_bytes_per_s
                busy_s = max(read_s, roofline.multiplied_s(operation, target, dtype))
                roofline_s += busy_s + operation.count * target.overhead_s
        return _Learnt(seconds, roofline_s, sure_s, spread_s)


def _known(target: Target) -> _Known:
    return _of_gpu(target) if gpu_chip(target) is not None else _Known((), None, _MODEL)


@functools.lru_cache(1)  # read once, not for each of a search's candidates
def _models(name: str) -> tuple[Pretrained, Calibration | None]:
    return pretrained.load(), stored(name)


def _of_gpu(target: Target) -> _Known:
    models, calibration = _models(target.name)
    calibrated = "not calibrated"
    if calibration is not None:
        calibrated = f"calibrated by {len(calibration.shots)} operations, {calibration.fingerprint}"
    return _Known(tuple(subjects(target, models)), calibration, f"{_MODEL}, {models.name}, {calibrated}")


def _as_measured(operation: Operation, point: OperatingPoint) -> tuple[str | None, tuple[object, ...]]:
    """The kind of table that an operation is in, and its columns there; none where it is in no table."""
    product, attention = operation.product, operation.attention
    if product is not None and product.compression is None and product.dtype == "bfloat16":
        narrow = product.format == product.inputs == "float8_e4m3"
        if narrow or (product.format == "bfloat16" and product.inputs == "as_is"):
            return "gemm", ("fp8" if narrow else "bfloat16", product.tokens, product.columns, product.rows)
    if attention is not None and attention.format == attention.dtype == "bfloat16":
        sizes = (attention.batch, attention.slots, attention.heads, attention.kv_heads, attention.head_dim)
        if point.phase == "decode":
            return "attn_generation", sizes
        if attention.slots == point.context:  # the tables' prompts see all that came before
            return "attn_context", sizes
    return None, ()
