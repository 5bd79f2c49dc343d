"""What the patterns share that leave single weights out: a decoder whose matrices are stored by a `Compression`."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from cosearch.architecture.linear import Compression
from cosearch.architecture.shape import DecoderShape
from cosearch.core.errors import Rejected
from cosearch.sparsity import Moments

Prune = Callable[[np.ndarray, np.ndarray | None], np.ndarray]
"""A matrix [in, out] and the moment of its inputs, [in, in] if there is one, to the matrix with zeros."""


def compressed_shape(shape: DecoderShape, compression: Compression) -> DecoderShape:
    """`shape` with its matrices compressed.

    Raises:
        Rejected: one of them cannot be.
    """
    left = replace(shape, compression=compression)
    for path, (*_, rows, columns) in left.linears().items():
        one = left.compression_of(path)
        if one is not None and (why := one.why_not(rows, columns)):
            raise Rejected(f"{path} [{rows}, {columns}] cannot be compressed: {why}")
    return left


def prune_matrices(
    weights: Mapping[str, np.ndarray], left: DecoderShape, moments: Moments | None, prune: Prune
) -> dict[str, np.ndarray]:
    """`weights` with each matrix that `left` compresses pruned, those of a stack one by one.

    `moments` is None where the criterion reads none.
    """
    pruned = dict(weights)
    for path, sizes in left.linears().items():
        if left.compression_of(path) is None:
            continue
        matrix, moment = weights[path], None if moments is None else moments[path]
        if len(sizes) == 2:
            pruned[path] = prune(matrix, moment)
        else:
            each = [None] * len(matrix) if moment is None else moment
            pruned[path] = np.stack([prune(one, own) for one, own in zip(matrix, each, strict=True)])
    return pruned
