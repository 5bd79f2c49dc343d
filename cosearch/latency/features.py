"""What a candidate runs, from its choices alone: nothing is compiled.

To tell the model of something new, add it to `Work` and to `physical`.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from cosearch import axes
from cosearch.architecture.cache import KVCache
from cosearch.core.candidate import Candidate, Value
from cosearch.core.space import Space
from cosearch.core.workload import OperatingPoint
from cosearch.precision import FORMATS, Precision


@dataclass(frozen=True)
class Work:
    """One run of an operating point: bytes that must be read, operations, and how many products there are."""

    weight_bytes: float
    cache_bytes: float
    flops: float
    products: int
    parameters: int


def work(candidate: Candidate, point: OperatingPoint) -> Work:
    """Count the work of one run at `point`."""
    shape, precision = axes.served_shape(candidate), Precision.of(candidate.precision)
    matrices = shape.linears().values()
    weights = FORMATS[precision.weights]
    bits = sum(rows * columns * weights.bits_per_weight(rows, columns) for rows, columns in matrices)
    tensors = [
        tensor for layer in shape.layers for tensor in layer.attention.cache(point.batch, point.context).values()
    ]
    cache = sum(_cached_bytes(precision.kv_cache, precision.activations, tensor) for tensor in tensors)
    attended = sum(math.prod(tensor) for tensor in tensors)
    return Work(
        weight_bytes=bits / 8,
        cache_bytes=cache,
        flops=2.0 * point.tokens * sum(rows * columns for rows, columns in matrices) + 2.0 * attended,
        products=len(matrices) + 2 * len(shape.layers),
        parameters=shape.parameters,
    )


@functools.cache
def _cached_bytes(name: str, dtype: str, tensor: tuple[int, int, int, int]) -> int:
    arrays = KVCache(name, dtype=dtype).spec({"tensor": tensor})["tensor"].values()
    return sum(array.size * array.dtype.itemsize for array in arrays)


def physical(work: Work) -> list[float]:
    """The work as features of even scale."""
    return [
        float(np.log(work.weight_bytes)),
        float(np.log(work.cache_bytes)),
        float(np.log(work.flops)),
        float(np.log(work.products)),
    ]


@dataclass(frozen=True)
class ChoiceEncoding:
    """Choices as features: numbers as the logarithm of their value, names as one feature each."""

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
                features.append(float(np.log(value)) if isinstance(value, int | float) else 0.0)
            else:
                features += [float(value == v) for v in values]
        return features
