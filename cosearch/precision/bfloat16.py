"""bfloat16: float32 cut to 8 bits of significand; the range stays, so nothing overflows that did not before."""

import ml_dtypes

from cosearch.precision import FORMATS
from cosearch.precision.floating import Floating

FORMATS.register("bfloat16")(Floating(ml_dtypes.bfloat16))
