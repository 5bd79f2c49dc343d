"""NVIDIA RTX PRO 6000 Blackwell Server Edition, 96 GB.

NVIDIA RTX PRO 6000 Blackwell Server Edition datasheet
(https://www.nvidia.com/en-us/data-center/rtx-pro-6000-blackwell-server-edition/), whose peak of FP4 is with sparsity:
half of it here, and half again for each doubling of the width. Bandwidth, multiprocessors, L2 cache and clock: XLA's
own description of the chip (xla/backends/gpu/target_config/specs/rtx6000pro.txtpb).
"""

from cosearch.targets import TARGETS
from cosearch.targets.gpu import GPU

TARGETS.register("rtx_pro_6000")(
    GPU(
        name="rtx_pro_6000",
        kind="NVIDIA RTX PRO 6000 Blackwell Server Edition",
        source="NVIDIA RTX PRO 6000 Blackwell Server Edition datasheet",
        peak_flops_per_s={
            "float32": 117e12,
            "bfloat16": 467.8e12,
            "int8": 935.6e12,
            "float8_e4m3fn": 935.6e12,
            "float4_e2m1fn": 1.8712e15,
        },
        bandwidth_bytes_per_s=1792e9,
        capacity_bytes=96 * 2**30,
        cache_bytes=128 * 2**20,
        cores=188,
        power_w=600,
        capability=(12, 0),
        clock_ghz=2.6,
    )
)
