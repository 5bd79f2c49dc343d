"""NVIDIA H200, 141 GB, SXM.

NVIDIA H200 Tensor Core GPU datasheet (H200 SXM, https://resources.nvidia.com/en-us-data-center-overview-mc/hpc-datasheet-sc23-h200),
of which all but the memory is an H100's (`h100.py`).
"""

from dataclasses import replace

from cosearch.targets import TARGETS
from cosearch.targets.h100 import H100

TARGETS.register("h200")(
    replace(
        H100,
        name="h200",
        kind="NVIDIA H200",
        source="NVIDIA H200 Tensor Core GPU datasheet, H200 SXM",
        bandwidth_bytes_per_s=4.8e12,
        capacity_bytes=141 * 2**30,
    )
)
