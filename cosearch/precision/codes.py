"""Codes: how a value that was divided by its scale becomes bits and back.

To add one, subclass `Code` here; a format (`quantized.py`) names it beside its `Scale` (`scales.py`). The same lines
run on arrays of numpy and on traced ones of JAX. Values beyond the largest code (where a scale was rounded down, or
chosen smaller by a calibration) are stored as the largest.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class Code(ABC):
    """What a value becomes that was divided by its scale; two codes of 4 bits share a byte."""

    dtype: Any
    """Of the stored array."""
    per_byte: int
    limit: float
    """The largest magnitude."""
    half_step: float
    """The largest error near 0."""
    relative: float
    """The largest error of a value, relative to it, where steps grow with it; else 0."""

    @abstractmethod
    def encode(self, scaled: Any) -> Any:
        """The code of each value, in `dtype`."""
        ...

    @abstractmethod
    def decode(self, codes: Any, dtype: Any) -> Any:
        """The value of each code, exactly, in `dtype`."""
        ...


@dataclass(frozen=True)
class Integer(Code):
    """Integers from -limit to limit, rounded half to even; `zero` is the code of 0."""

    zero: int

    def encode(self, scaled: Any) -> Any:
        return (scaled.clip(-self.limit, self.limit).round() + self.zero).astype(self.dtype)

    def decode(self, codes: Any, dtype: Any) -> Any:
        return (codes.astype(np.int32) - self.zero).astype(dtype) if self.zero else codes.astype(dtype)


class Float8(Code):
    """float8_e4m3fn: 1 sign, 4 exponent (bias 7) and 3 significand bits, no infinities (Micikevicius et al. 2022,
    arXiv:2209.05433). Saturates at 448, so that its NaN is never made."""

    def encode(self, scaled: Any) -> Any:
        return scaled.clip(-self.limit, self.limit).astype(self.dtype)

    def decode(self, codes: Any, dtype: Any) -> Any:
        return codes.astype(dtype)


class Float4(Code):
    """e2m1 of OCP Microscaling Formats v1.0: 0, 0.5, 1, 1.5, 2, 3, 4, 6 by rising code, and 8 more for the sign.

    Rounded half to the even code; saturates at 6.
    """

    def encode(self, scaled: Any) -> Any:
        size = abs(scaled)
        # A tie goes to the even code, so that it counts where the code above is even.
        above = [size > 0.25, size >= 0.75, size > 1.25, size >= 1.75, size > 2.5, size >= 3.5, size > 5]
        return sum(reached.astype(np.uint8) for reached in above) + (scaled < 0).astype(np.uint8) * np.uint8(8)

    def decode(self, codes: Any, dtype: Any) -> Any:
        # In integers: looking values up in a table is a gather, which CPUs do one by one.
        codes = codes.astype(np.int32)
        exponent, fraction = (codes & 7) >> 1, codes & 1
        normal = (exponent > 0).astype(np.int32)
        doubled = (fraction | normal << 1) << (exponent - normal)
        return (doubled * (1 - (codes >> 3 << 1))).astype(dtype) * np.asarray(0.5, dtype)


INT8 = Integer(np.int8, per_byte=1, limit=127, half_step=0.5, relative=0, zero=0)
INT4 = Integer(np.uint8, per_byte=2, limit=7, half_step=0.5, relative=0, zero=8)
"""As llama.cpp's Q4_0 has them: the nibble is the value plus 8, 1 to 15."""
# Half a step is 1/16 from 1 to 2, so the relative error is largest at 1 + 1/16; of 4 bits, at 2.5 that becomes 2.
FLOAT8 = Float8(ml_dtypes.float8_e4m3fn, per_byte=1, limit=448, half_step=2.0**-10, relative=1 / 17)
FLOAT4 = Float4(np.uint8, per_byte=2, limit=6, half_step=0.25, relative=1 / 5)
