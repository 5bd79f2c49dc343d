"""Symmetric 8-bit integers with one float32 scale an output channel; for the KV cache, a bfloat16 a token and head.

A value is stored as round(value / scale) with scale = absmax / 127, so the error is at most half a step,
absmax / 254, and -128 is not used. NaN and infinities have no place: packing refuses them.
"""

from cosearch.precision import CALIBRATIONS, FORMATS
from cosearch.precision.codes import INT8
from cosearch.precision.quantized import Quantized
from cosearch.precision.scales import BFLOAT16, FLOAT32

FORMATS.register("int8")(
    Quantized(INT8, scale=FLOAT32, cache_scale=BFLOAT16, inputs=("int8",), calibrations=CALIBRATIONS)
)
