"""What the patterns share that store matrices by a `Compression`: they leave single weights out, or blocks of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from cosearch.architecture.linear import Compression
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Value
from cosearch.core.errors import Rejected
from cosearch.core.space import Knob
from cosearch.sparsity import Moments
from cosearch.sparsity.criteria import reads_moments, saliency


@dataclass(frozen=True)
class CompressedPattern:
    """Of each matrix the most salient weights stay that its compression, made of the choices, has room for.

    `sparsegpt` prunes one matrix [in, out] by that criterion and the moment [in, in] of its inputs; None where
    `compression` refuses it.
    """

    knobs: Mapping[str, Knob]
    compression: Callable[[Mapping[str, Value]], Compression]
    sparsegpt: Callable[[np.ndarray, np.ndarray, Mapping[str, Value]], np.ndarray] | None = None

    def shape(self, shape: DecoderShape, choices: Mapping[str, Value]) -> DecoderShape:
        left = replace(shape, compression=self.compression(choices))
        for path, (*_, rows, columns) in left.linears().items():
            one = left.compression_of(path)
            if one is not None and (why := one.why_not(rows, columns)):
                raise Rejected(f"{path} [{rows}, {columns}] cannot be compressed: {why}")
        return left

    def needs_moments(self, choices: Mapping[str, Value]) -> bool:
        return reads_moments(choices)

    def prune(
        self, weights: Mapping[str, np.ndarray], shape: DecoderShape, choices: Mapping[str, Value], moments: Moments
    ) -> dict[str, np.ndarray]:
        left, pruned = self.shape(shape, choices), dict(weights)
        for path in left.linears():
            if left.compression_of(path) is not None:
                moment = moments[path] if reads_moments(choices) else None
                pruned[path] = self._prune(weights[path], moment, choices)
        return pruned

    def _prune(self, matrix: np.ndarray, moment: np.ndarray | None, choices: Mapping[str, Value]) -> np.ndarray:
        if matrix.ndim > 2:
            moments = [None] * len(matrix) if moment is None else moment
            return np.stack([self._prune(one, own, choices) for one, own in zip(matrix, moments, strict=True)])
        if self.sparsegpt is not None and moment is not None and choices["criterion"] == "sparsegpt":
            return self.sparsegpt(matrix, moment, choices)
        compression = self.compression(choices)
        values, indices = compression.compress(matrix, "in_out", saliency(matrix, moment))
        return compression.expand(values, indices, len(matrix), "in_out")
