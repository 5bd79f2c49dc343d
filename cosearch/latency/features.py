"""What a candidate runs, from its choices alone: nothing is compiled.

The roofline is made of it (`roofline.py`). What the learned model knows of each operation is `batch.py`'s.
"""

import functools
from dataclasses import dataclass

from cosearch import axes
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Candidate
from cosearch.core.workload import OperatingPoint
from cosearch.latency.operations import operations_of
from cosearch.precision import Precision
from cosearch.schedule import Schedule


@dataclass(frozen=True)
class Work:
    """One run of an operating point: bytes that are stored, bytes that must be read, operations, and how many
    products there are."""

    weight_bytes: float
    cache_bytes: float
    read_bytes: float
    flops: float
    products: int
    parameters: int


def work(candidate: Candidate, point: OperatingPoint) -> Work:
    """Count the work of one run at `point`."""
    return _work(axes.served_shape(candidate), Precision.of(candidate.precision), point)


@functools.lru_cache(8192)  # thousands of candidates are screened, that differ in their schedules too
def _work(shape: DecoderShape, precision: Precision, point: OperatingPoint) -> Work:
    each = list(operations_of(shape, precision, Schedule(), point))  # how they are run changes none of the figures
    cached = [one for one in each if one.product is None]
    cache_bytes = sum(one.stored_bytes for one in cached)
    return Work(
        weight_bytes=sum(one.stored_bytes for one in each) - cache_bytes,
        cache_bytes=cache_bytes,
        read_bytes=sum(one.read_bytes for one in each),
        flops=sum(one.flops for one in each),
        products=1 + sum(2 if one.product is None else round(one.count) for one in each),
        parameters=shape.parameters,
    )
