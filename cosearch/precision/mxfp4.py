"""MXFP4: e2m1 values, 32 rows of a column to a scale that is a power of two, in one byte.

OCP Microscaling Formats (MX) Specification v1.0, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf,
section 6.3: the shared exponent is floor(log2(absmax)) - 2, the 2 being the exponent of the largest value, 6. A group's
absmax is so between 4 and 8 scales, and what is beyond 6 is stored as 6; errors are at most 2 scales there and 1 scale
elsewhere. NaN and infinities have no place: packing refuses them, and the scale's NaN (255) is never made.
"""

from cosearch.precision import FORMATS
from cosearch.precision.codes import FLOAT4
from cosearch.precision.quantized import Quantized
from cosearch.precision.scales import PowerOfTwo

FORMATS.register("mxfp4")(
    Quantized(FLOAT4, group=32, scale=PowerOfTwo(largest_exponent=2), calibrations=("absmax", "awq"))
)
