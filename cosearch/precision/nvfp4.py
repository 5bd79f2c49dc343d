"""NVFP4: e2m1 values, 16 rows of a column to a float8_e4m3 scale, and one float32 for the whole matrix.

NVIDIA 2025, "Pretraining Large Language Models with NVFP4", arXiv:2509.25149: the matrix's scale is
absmax / (6 * 448), so that the largest group's is 448. Errors are at most 1/5 of a value, or a quarter of its scale
where that is more, and 1/17 more for the rounding of the scale; a group whose absmax is less than 2^-18.8 of the
matrix's is stored as zeros. What lies beyond 6 scales is stored as 6. NaN and infinities have no place: packing refuses
them.
"""

from cosearch.precision import FORMATS
from cosearch.precision.codes import FLOAT4
from cosearch.precision.quantized import Quantized
from cosearch.precision.scales import TwoLevel

FORMATS.register("nvfp4")(Quantized(FLOAT4, group=16, scale=TwoLevel(), calibrations=("absmax", "awq")))
