"""NVIDIA B200, 180 GB, as in HGX B200.

NVIDIA Blackwell datasheet (HGX B200, https://resources.nvidia.com/en-us-blackwell-architecture/datasheet), an eighth
of the board, whose peaks are with sparsity: half of them here. Multiprocessors, L2 cache and clock: XLA's own
description of it (xla/backends/gpu/target_config/specs/b200.txtpb).
"""

from cosearch.targets import TARGETS
from cosearch.targets.gpu import GPU

TARGETS.register("b200")(
    GPU(
        name="b200",
        kind="NVIDIA B200",
        source="NVIDIA Blackwell datasheet, HGX B200, one of eight GPUs",
        peak_flops_per_s={
            "float32": 75e12,
            "bfloat16": 2.25e15,
            "int8": 4.5e15,
            "float8_e4m3fn": 4.5e15,
            "float4_e2m1fn": 9e15,
        },
        bandwidth_bytes_per_s=7.7e12,
        capacity_bytes=180 * 2**30,
        cache_bytes=126 * 2**20,
        cores=148,
        power_w=1000,
        capability=(10, 0),
        clock_ghz=1.965,
    )
)
