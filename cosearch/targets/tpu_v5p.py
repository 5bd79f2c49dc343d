"""Google TPU v5p.

Google Cloud documentation, TPU v5p (https://docs.cloud.google.com/tpu/docs/v5p): 459 TFLOPs in bfloat16, 95 GB at
2765 GB/s; int8 at twice the rate, by the announcement of 2023. It does not say what it draws.
"""

from cosearch.targets import TARGETS
from cosearch.targets.tpu import TPU, peaks

TARGETS.register("tpu_v5p")(
    TPU(
        name="tpu_v5p",
        kind="TPU v5",
        source="Google Cloud documentation, TPU v5p",
        peak_flops_per_s=peaks(bfloat16=459e12, int8=918e12),
        bandwidth_bytes_per_s=2765e9,
        capacity_bytes=95 * 10**9,
        cache_bytes=128 * 2**20,
        cores=2,
        topology="v5p:2x2x1",
    )
)
