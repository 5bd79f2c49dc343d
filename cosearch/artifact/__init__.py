"""Artifacts: a point of the front as a folder that anyone can load, check and run.

manifest.json        candidate, metrics, fingerprint, programs, tensors, and the SHA-256 of every other file
verification.json    the compiled programs against float64, with the trained weights in them
weights.safetensors  the parameters as they are stored, by path
<phase>.executable   the compiled program, for the same jaxlib and chip
<phase>.stablehlo    the same program by `jax.export`, to be compiled anywhere
"""

import ml_dtypes
import numpy as np

VERSION = 2
MANIFEST, VERIFICATION, WEIGHTS = "manifest.json", "verification.json", "weights.safetensors"

DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
}
"""What parameters may be made of, as safetensors names it; of what else it knows, numpy has no dtype."""
