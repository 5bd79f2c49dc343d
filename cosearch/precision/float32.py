"""IEEE 754 binary32, the format that models are trained in and compared with."""

import numpy as np

from cosearch.precision import FORMATS
from cosearch.precision.floating import Floating

FORMATS.register("float32")(Floating(np.float32))
