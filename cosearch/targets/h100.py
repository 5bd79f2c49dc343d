"""NVIDIA H100, 80 GB, SXM.

NVIDIA H100 Tensor Core GPU datasheet (H100 SXM, https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306),
whose peaks are with sparsity: half of them here. Multiprocessors, L2 cache and clock: its architecture's whitepaper.
"""

from cosearch.targets import TARGETS
from cosearch.targets.gpu import GPU

H100 = GPU(
    name="h100",
    kind="NVIDIA H100 80GB HBM3",
    source="NVIDIA H100 Tensor Core GPU datasheet, H100 SXM",
    peak_flops_per_s={"float32": 67e12, "bfloat16": 989.5e12, "int8": 1979e12, "float8_e4m3fn": 1979e12},
    bandwidth_bytes_per_s=3.35e12,
    capacity_bytes=80 * 2**30,
    cache_bytes=50 * 2**20,
    cores=132,
    power_w=700,
    capability=(9, 0),
    clock_ghz=1.98,
)
TARGETS.register("h100")(H100)
