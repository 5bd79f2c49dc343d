"""IEEE 754 binary64, which verification computes its reference in. It is no choice for a candidate."""

import numpy as np

from cosearch.precision import FORMATS
from cosearch.precision.floating import Floating

FORMATS.register("float64")(Floating(np.float64, weights=False, cache=False, activations=False))
