"""Compiling for a chip that is not there, which says whether a kernel is legal on it.

For TPUs that takes the wheel `libtpu`; for GPUs, `jax-cuda12-plugin` or `jax-cuda13-plugin` with its `-pjrt`, in the
version of jaxlib. Set `JAX_PLATFORMS=cpu`, `TPU_SKIP_MDS_QUERY=1` and `JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1`.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}

# As XLA describes an H100 SXM; the memory's figures are those of NVIDIA's datasheet.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 device_memory_size: 85045542912 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

CHIPS = (*TPUS, "h100")


def why_not(chip: str) -> str | None:
    """Why nothing can be compiled for `chip` here; None where it can."""
    if chip in TPUS:
        return None if find_spec("libtpu") else "libtpu is not installed"
    if not any(find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        return "JAX's plugin for CUDA is not installed"
    return None


@functools.cache
def _mesh(chip: str) -> Mesh:
    """Of one chip; the same each time, for devices of two descriptions are two devices."""
    if chip in TPUS:
        topology = topologies.get_topology_desc(TPUS[chip], "tpu")
    else:
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=_H100)
    return Mesh(np.array(topology.devices[:1]), ("chip",))


def compile_for(chip: str, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """`function` of arrays or their specs, jitted or not, compiled for one of `CHIPS`."""
    platform, mesh = ("tpu" if chip in TPUS else "cuda"), _mesh(chip)
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        specs = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=whole), arguments)
        jitted = function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)
        return jitted.trace(*specs).lower(lowering_platforms=(platform,)).compile()
