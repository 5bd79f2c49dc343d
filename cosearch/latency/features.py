"""What a candidate runs, from its choices alone: nothing is compiled.

The roofline is made of it (`roofline.py`). What the learned model knows of each operation is `batch.py`'s.
"""

import functools
import math
from dataclasses import dataclass

from cosearch import axes
from cosearch.architecture.decoder import stored_as
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Candidate
from cosearch.core.workload import OperatingPoint
from cosearch.latency.operations import STATE_BYTES, cached_bytes, read_fraction
from cosearch.precision import Precision


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
    weights = read = flops = 0.0
    products = 1
    for path, sizes in shape.linears().items():
        storage = stored_as(shape, precision, path)
        stored = storage.bits(sizes) / 8
        compression = storage.compression
        multiplied = sizes[-1] * (compression.stored_rows(sizes[-2]) if compression else sizes[-2])
        matrices = math.prod(sizes[:-2])
        weights += stored
        read += stored * read_fraction(shape, path, point.tokens)
        used = matrices * read_fraction(shape, path, 1)  # by each token
        flops += 2.0 * point.tokens * used * multiplied
        products += round(used)
    cache, held = 0.0, ""
    for index, layer in enumerate(shape.layers):
        attention = layer.attention
        if attention is None:
            continue
        products += 2
        flops += 2.0 * point.batch * attention.multiplications(point.tokens // point.batch, point.context)
        tensors = attention.cache(point.batch, point.context)
        if tensors:
            held = precision.cache_format(index)  # and what layers above read that have no cache of their own
        cache += sum(cached_bytes(held, precision.activations, tensor) for tensor in tensors.values())
        reads = attention.reads(point.batch, point.context)
        read += sum(cached_bytes(held, precision.activations, tensor) for tensor in reads.values())
        states = sum(math.prod(state) for state in attention.states(point.batch, point.context).values())
        cache += STATE_BYTES * states
        read += STATE_BYTES * states
    return Work(weights, cache, read, flops, products, shape.parameters)
