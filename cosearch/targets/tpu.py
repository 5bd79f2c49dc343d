"""What Google's TPUs have in common. To add one, write a file with a literal `TPU` (`tpu_v5e.py`).

`cache_bytes` is the memory on the chip (VMEM, on v4 CMEM), which the compiler fills: TPU Hardware Reference
(https://docs.jax.dev/en/latest/pallas/tpu/hardware.html). A product of float32 is six of bfloat16 parts
(`jax.lax.Precision.HIGHEST`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from jax.sharding import Mesh

from cosearch.targets.accelerator import Accelerator, one_chip

_PASSES = 6


def peaks(bfloat16: float, int8: float) -> Mapping[str, float]:
    """The peaks of a chip of these two."""
    return {"float32": bfloat16 / _PASSES, "bfloat16": bfloat16, "int8": int8}


@dataclass(frozen=True, kw_only=True)
class TPU(Accelerator):
    """A TPU of Google's; `cores` are its TensorCores, `topology` is the smallest slice that the compiler knows."""

    topology: str

    platform = "tpu"
    lowered_for = "tpu"
    overhead_s = 1e-6  # of a fusion; no datasheet's figure

    def why_unavailable(self) -> str | None:
        return None if find_spec("libtpu") else "libtpu, which is not installed: pip install 'cosearch[tpu]'"

    def mesh(self) -> Mesh:
        return one_chip("tpu", self.topology)
