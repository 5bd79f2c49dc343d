"""What a candidate runs, from its choices alone: nothing is compiled.

To tell the model of something new, add it to `Work` and to `physical`.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from cosearch import axes
from cosearch.architecture.decoder import stored_as
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Candidate, Value
from cosearch.core.space import Space
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


def physical(work: Work) -> list[float]:
    """The work as features of even scale."""
    return [
        float(np.log(work.weight_bytes)),
        float(np.log(work.cache_bytes)),
        float(np.log(work.read_bytes)),
        float(np.log(work.flops)),
        float(np.log(work.products)),
    ]


@dataclass(frozen=True)
class ChoiceEncoding:
    """Choices as features: numbers, which may be 0, as the logarithm of 1 more; names as one feature each."""

    knobs: dict[str, tuple[Value, ...]]

    @classmethod
    def of(cls, space: Space, reference: Candidate, *axes_read: str) -> "ChoiceEncoding":
        """Encode the knobs of some axes that vary over the space and its reference."""
        found = {}
        for name, values in space.knobs.items():
            own = reference.point.get(name)
            every = values if own is None or own in values else (*values, own)
            if name.split(".")[0] in axes_read and len(every) > 1:
                found[name] = every
        return cls(found)

    def __call__(self, candidate: Candidate) -> list[float]:
        point, features = candidate.point, []
        for name, values in self.knobs.items():
            value = point.get(name)
            if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
                features.append(float(np.log1p(value)) if isinstance(value, int | float) else 0.0)
            else:
                features += [float(value == v) for v in values]
        return features
