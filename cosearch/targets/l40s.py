"""NVIDIA L40S, 48 GB.

NVIDIA L40S datasheet (https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413), peaks without sparsity.
Multiprocessors, L2 cache and clock: the whitepaper of the Ada architecture.
"""

from cosearch.targets import TARGETS
from cosearch.targets.gpu import GPU

TARGETS.register("l40s")(
    GPU(
        name="l40s",
        kind="NVIDIA L40S",
        source="NVIDIA L40S datasheet",
        peak_flops_per_s={"float32": 91.6e12, "bfloat16": 362.05e12, "int8": 733e12, "float8_e4m3fn": 733e12},
        bandwidth_bytes_per_s=864e9,
        capacity_bytes=48 * 2**30,
        cache_bytes=96 * 2**20,
        cores=142,
        power_w=350,
        capability=(8, 9),
        clock_ghz=2.52,
    )
)
