"""Google TPU v6e (Trillium).

Google Cloud documentation, TPU v6e (https://docs.cloud.google.com/tpu/docs/v6e): 918 TFLOPs in bfloat16, 1836 TOPs in
int8, 32 GB at 1638 GB/s. It does not say what it draws.
"""

from cosearch.targets import TARGETS
from cosearch.targets.tpu import TPU, peaks

TARGETS.register("tpu_v6e")(
    TPU(
        name="tpu_v6e",
        kind="TPU v6 lite",
        source="Google Cloud documentation, TPU v6e",
        peak_flops_per_s=peaks(bfloat16=918e12, int8=1836e12),
        bandwidth_bytes_per_s=1638e9,
        capacity_bytes=32 * 2**30,
        cache_bytes=128 * 2**20,
        cores=1,
        topology="v6e:2x2",
    )
)
