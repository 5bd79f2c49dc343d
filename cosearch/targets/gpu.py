"""What NVIDIA's GPUs have in common. To add one, write a file with a literal `GPU` (`h100.py`); one of a new compute
capability needs a line of `_MULTIPROCESSORS`, too.

What XLA must know of a chip to compile for it without one is written from its literal and from what all chips of its
compute capability share: CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute Capability"
(https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities).

Peaks are of the tensor cores, but for float32: those would round it to TF32.
"""

from dataclasses import dataclass
from importlib.util import find_spec

from jax.sharding import Mesh

from cosearch.core.errors import UserError
from cosearch.targets.accelerator import Accelerator, one_chip


@dataclass(frozen=True)
class _Multiprocessor:
    """What a multiprocessor of a compute capability has: threads, lanes of float32, bytes of shared memory, and how
    many of them one block can have."""

    threads: int
    lanes: int
    shared_bytes: int
    block_shared_bytes: int


_MULTIPROCESSORS = {
    (8, 0): _Multiprocessor(2048, 64, 164 * 1024, 163 * 1024),
    (8, 6): _Multiprocessor(1536, 128, 100 * 1024, 99 * 1024),
    (8, 7): _Multiprocessor(1536, 128, 164 * 1024, 163 * 1024),
    (8, 9): _Multiprocessor(1536, 128, 100 * 1024, 99 * 1024),
    (9, 0): _Multiprocessor(2048, 128, 228 * 1024, 227 * 1024),
    (10, 0): _Multiprocessor(2048, 128, 228 * 1024, 227 * 1024),
    (10, 3): _Multiprocessor(2048, 128, 228 * 1024, 227 * 1024),
    (12, 0): _Multiprocessor(1536, 128, 100 * 1024, 99 * 1024),
    (12, 1): _Multiprocessor(1536, 128, 100 * 1024, 99 * 1024),
}

# XLA's GpuTargetConfigProto (xla/stream_executor/device_description.proto).
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {shared.threads}
  core_count: {chip.cores} fpus_per_core: {shared.lanes} clock_rate_ghz: {chip.clock_ghz}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared.shared_bytes}
  shared_memory_per_block_optin: {shared.block_shared_bytes}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth} device_memory_size: {chip.capacity_bytes} l2_cache_size: {chip.cache_bytes}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {chip.capability[0]} minor: {chip.capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{chip.kind}"
"""


@dataclass(frozen=True, kw_only=True)
class GPU(Accelerator):
    """A GPU of NVIDIA's; `cores` are its multiprocessors."""

    capability: tuple[int, int]
    clock_ghz: float

    platform = "gpu"
    lowered_for = "cuda"
    overhead_s = 2e-6  # of a kernel in a graph of kernels; no datasheet's figure

    def __post_init__(self) -> None:
        if self.capability not in _MULTIPROCESSORS:
            known = ", ".join(f"{major}.{minor}" for major, minor in _MULTIPROCESSORS)
            wanted = ".".join(map(str, self.capability))
            raise UserError(f"target {self.name}: nothing is known here of compute capability {wanted}. Known: {known}")

    def why_unavailable(self) -> str | None:
        if any(find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
            return None
        return "JAX's plugin for CUDA, which is not installed: pip install 'cosearch[cuda13]'"

    def mesh(self) -> Mesh:
        return one_chip("cuda", "", topology="1x1x1", target_config=self.description)

    @property
    def description(self) -> str:
        """What XLA must know of it."""
        shared = _MULTIPROCESSORS[self.capability]
        return _DESCRIPTION.format(chip=self, shared=shared, bandwidth=round(self.bandwidth_bytes_per_s))
