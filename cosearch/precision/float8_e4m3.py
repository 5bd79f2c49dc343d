"""float8_e4m3fn with one float32 scale an output channel; for the KV cache, a bfloat16 a token and head.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433. The scale is absmax / 448, so that the
largest value is the largest number of the format; errors are at most 1/17 of a value, or of the scale 2^-10 where that
is more. What lies beyond 448 is stored as 448, so that the format's NaN is never made; NaN and infinities have no
place: packing refuses them.
"""

from cosearch.precision import FORMATS
from cosearch.precision.codes import FLOAT8
from cosearch.precision.quantized import Quantized
from cosearch.precision.scales import BFLOAT16, FLOAT32

FORMATS.register("float8_e4m3")(
    Quantized(FLOAT8, scale=FLOAT32, cache_scale=BFLOAT16, inputs=("float8_e4m3",), calibrations=("absmax", "awq"))
)
