"""Symmetric 4-bit integers with one bfloat16 scale for 32, 64 or 128 rows of a column; as `int4`, a KV cache's format
with one a token and head.

A value is stored as round(value / scale), -7 to 7, with scale = absmax / 7 rounded to bfloat16, so the error is at
most half a step, absmax / 14 and 1/256 of that. Nibbles hold the value plus 8, as llama.cpp's Q4_0 has it, and -8 is
not used. NaN and infinities have no place: packing refuses them.
"""

from cosearch.precision import CALIBRATIONS, FORMATS
from cosearch.precision.codes import INT4
from cosearch.precision.quantized import Quantized
from cosearch.precision.scales import BFLOAT16

for _group in (32, 64, 128):
    FORMATS.register(f"int4_g{_group}")(
        Quantized(INT4, group=_group, scale=BFLOAT16, inputs=("int8",), calibrations=CALIBRATIONS)
    )
FORMATS.register("int4")(Quantized(INT4, cache_scale=BFLOAT16))
