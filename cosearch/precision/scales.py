"""Scales: how they are chosen for the groups of a matrix or the tokens of a cache, and how they are stored.

To add one, write a class as `Scale` says; a format (`quantized.py`) names it beside its `Code` (`codes.py`). The same
lines run on arrays of numpy and on traced ones of JAX and give the same bits of float32 weights. For that, scales come
from a product with a constant's reciprocal, which is what XLA makes of a division by a constant, and scales too small
for a normal float32 count as 0, for XLA on CPUs flushes denormal numbers.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from cosearch.precision import Stored
from cosearch.precision.codes import FLOAT8

_TINY = np.finfo(np.float32).smallest_normal


class Scale(Protocol):
    """How scales, [G, out] or in another order, are chosen and stored."""

    def choose(self, absmax: Any, limit: float) -> Any:
        """The scales, not yet rounded, for groups of these largest magnitudes and a code of this largest value."""
        ...

    def store(self, scale: Any) -> dict[str, Any]:
        """The parts that hold the scales."""
        ...

    def load(self, stored: Stored, dtype: Any) -> Any:
        """The scales that the parts hold, in `dtype`."""
        ...

    def spec(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """The parts for scales of this shape."""
        ...

    def between(self, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest that storing may make of these scales in float64."""
        ...


@dataclass(frozen=True)
class Plain:
    """absmax / limit, rounded to a dtype of float32's range."""

    dtype: Any

    def choose(self, absmax: Any, limit: float) -> Any:
        return _over(absmax, limit)

    def store(self, scale: Any) -> dict[str, Any]:
        return {"scale": scale.astype(self.dtype)}

    def load(self, stored: Stored, dtype: Any) -> Any:
        return stored["scale"].astype(dtype)

    def spec(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        return {"scale": jax.ShapeDtypeStruct(shape, self.dtype)}

    def between(self, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        off = float(jnp.finfo(self.dtype).eps) / 2
        return scale * (1 - off), scale * (1 + off)


@dataclass(frozen=True)
class PowerOfTwo:
    """E8M0 of OCP Microscaling Formats v1.0: a byte e for 2^(e - 127), the power of two at or below absmax over the
    largest power of two among the codes. Scales are at least 2^-126, never denormal."""

    largest_exponent: int

    def choose(self, absmax: Any, limit: float) -> Any:
        exponent = _exponent(absmax).clip(self.largest_exponent + 1) - self.largest_exponent
        return (exponent << 23).view(np.float32)

    def store(self, scale: Any) -> dict[str, Any]:
        return {"scale": _exponent(scale).clip(1).astype(np.uint8)}

    def load(self, stored: Stored, dtype: Any) -> Any:
        return (stored["scale"].astype(np.int32) << 23).view(np.float32).astype(dtype)

    def spec(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        return {"scale": jax.ShapeDtypeStruct(shape, np.uint8)}

    def between(self, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return scale, scale


@dataclass(frozen=True)
class TwoLevel:
    """absmax / limit in float8_e4m3, times one float32 for the whole matrix that brings the largest to 448.

    A group whose scale is less than 2^-10 of that float32, or 2^-18.8 of the largest scale, is stored as zeros.
    """

    def choose(self, absmax: Any, limit: float) -> Any:
        return _over(absmax, limit)

    def store(self, scale: Any) -> dict[str, Any]:
        xp = scale.__array_namespace__()
        tensor = _over(scale.max(keepdims=True).astype(np.float32), FLOAT8.limit)
        return {"scale": FLOAT8.encode(scale / xp.where(tensor > 0, tensor, 1)), "tensor_scale": tensor}

    def load(self, stored: Stored, dtype: Any) -> Any:
        return stored["scale"].astype(dtype) * stored["tensor_scale"].astype(dtype)

    def spec(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "scale": jax.ShapeDtypeStruct(shape, FLOAT8.dtype),
            "tensor_scale": jax.ShapeDtypeStruct((1,) * len(shape), np.float32),
        }

    def between(self, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        off = np.maximum(scale * FLOAT8.relative, np.minimum(scale.max() / FLOAT8.limit * FLOAT8.half_step, scale))
        return scale - off, scale + off


def _over(absmax: Any, limit: float) -> Any:
    """absmax / limit, and 0 where that is too small for a normal float32."""
    scale = absmax * np.float32(1 / limit)
    return scale.__array_namespace__().where(scale < _TINY, 0, scale).astype(scale.dtype)


def _exponent(size: Any) -> Any:
    """floor(log2(size)) + 127 of magnitudes, in int32; 0 for those too small for a normal float32."""
    return size.astype(np.float32).view(np.int32) >> 23


FLOAT32, BFLOAT16 = Plain(np.float32), Plain(ml_dtypes.bfloat16)
