"""Artifacts: a point of the front as a folder that anyone can load, check and run.

manifest.json        candidate, metrics, fingerprint, programs, tensors, and the SHA-256 of every other file
verification.json    the compiled programs against float64, with the trained weights in them
weights.safetensors  the parameters as they are stored, by path
<phase>.executable   the compiled program, for the same jaxlib and chip
<phase>.stablehlo    the same program by `jax.export`, to be compiled anywhere
"""

VERSION = 1
MANIFEST, VERIFICATION, WEIGHTS = "manifest.json", "verification.json", "weights.safetensors"
