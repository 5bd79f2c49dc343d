"""NVIDIA A100, 80 GB, SXM.

NVIDIA A100 Tensor Core GPU datasheet (A100 80GB SXM,
https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-nvidia-us-2188504-web.pdf)
and the whitepaper of its architecture, for multiprocessors, L2 cache and clock. It has no float8 products.
"""

from cosearch.targets import TARGETS
from cosearch.targets.gpu import GPU

TARGETS.register("a100")(
    GPU(
        name="a100",
        kind="NVIDIA A100-SXM4-80GB",
        source="NVIDIA A100 Tensor Core GPU datasheet, A100 80GB SXM",
        peak_flops_per_s={"float32": 19.5e12, "bfloat16": 312e12, "int8": 624e12},
        bandwidth_bytes_per_s=2039e9,
        capacity_bytes=80 * 2**30,
        cache_bytes=40 * 2**20,
        cores=108,
        power_w=400,
        capability=(8, 0),
        clock_ghz=1.41,
    )
)
