"""NVIDIA H200, 141 GB, SXM.

NVIDIA H200 Tensor Core GPU datasheet (H200 SXM, https://resources.nvidia.com/en-us-data-center-overview-mc/hpc-datasheet-sc23-h200),
whose peaks are with sparsity: half of them here. The rest is an H100's (`h100.py`), with more memory.
"""

from cosearch.targets import TARGETS
from cosearch.targets.gpu import GPU

TARGETS.register("h200")(
    GPU(
        name="h200",
        kind="NVIDIA H200",
        source="NVIDIA H200 Tensor Core GPU datasheet, H200 SXM",
        peak_flops_per_s={"float32": 67e12, "bfloat16": 989.5e12, "int8": 1979e12, "float8_e4m3fn": 1979e12},
        bandwidth_bytes_per_s=4.8e12,
        capacity_bytes=141 * 2**30,
        cache_bytes=50 * 2**20,
        cores=132,
        power_w=700,
        capability=(9, 0),
        clock_ghz=1.98,
    )
)
