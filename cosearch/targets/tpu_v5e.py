"""Google TPU v5e.

Google Cloud documentation, TPU v5e (https://docs.cloud.google.com/tpu/docs/v5e): 197 TFLOPs in bfloat16, 393 TOPs in
int8, 16 GB at 819 GB/s. It does not say what it draws.
"""

from cosearch.targets import TARGETS
from cosearch.targets.tpu import TPU, peaks

TARGETS.register("tpu_v5e")(
    TPU(
        name="tpu_v5e",
        kind="TPU v5 lite",
        source="Google Cloud documentation, TPU v5e",
        peak_flops_per_s=peaks(bfloat16=197e12, int8=393e12),
        bandwidth_bytes_per_s=819e9,
        capacity_bytes=16 * 2**30,
        cache_bytes=128 * 2**20,
        cores=1,
        topology="v5e:2x2",
    )
)
