"""Google TPU v4.

Google Cloud documentation, TPU v4 (https://docs.cloud.google.com/tpu/docs/v4): 275 teraflops in bfloat16 or int8,
32 GiB at 1200 GB/s, 192 W at most.
"""

from cosearch.targets import TARGETS
from cosearch.targets.tpu import TPU, peaks

TARGETS.register("tpu_v4")(
    TPU(
        name="tpu_v4",
        kind="TPU v4",
        source="Google Cloud documentation, TPU v4",
        peak_flops_per_s=peaks(bfloat16=275e12, int8=275e12),
        bandwidth_bytes_per_s=1200e9,
        capacity_bytes=32 * 2**30,
        cache_bytes=128 * 2**20,
        cores=2,
        power_w=192,
        topology="v4:2x2x1",
    )
)
