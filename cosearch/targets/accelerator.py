"""GPUs and TPUs: what is known of one without having it, and how XLA compiles for it there.

A chip is a literal of `gpu.GPU` or `tpu.TPU`. Compiling needs JAX's plugin for that kind of chip, not the chip: the
process must have been started with `ENVIRONMENT`.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cosearch.core.candidate import Candidate, Value
from cosearch.core.errors import Rejected, UserError, first_line
from cosearch.core.target import Target
from cosearch.precision.quantized import multiplied
from cosearch.targets import TARGETS, MeasurePeaks, why_no_value_for, why_no_value_of

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # else libtpu asks Google Cloud what machine this is, and waits for the answer
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else one process at a time may load it, since it could take the chip
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # else JAX's plugin for CUDA wants the libraries that running takes
}
"""Of a process that compiles for a chip that is not attached to its machine."""

_EXACT = "highest"
"""Products of float32 are that: by default XLA multiplies bfloat16 on TPUs, and TF32 on GPUs, in their place, which is
another format than the candidate says."""


@dataclass(frozen=True, kw_only=True)
class Accelerator(ABC):
    """A chip as its datasheet describes it; peaks are of dense products, `kind` is JAX's name of such a device."""

    name: str
    kind: str
    source: str
    peak_flops_per_s: Mapping[str, float]
    bandwidth_bytes_per_s: float
    capacity_bytes: int
    cache_bytes: int
    cores: int
    power_w: float | None = None

    environment: ClassVar[Mapping[str, str]] = {"JAX_DEFAULT_MATMUL_PRECISION": _EXACT}
    platform: ClassVar[str]
    lowered_for: ClassVar[str]
    overhead_s: ClassVar[float]

    @abstractmethod
    def why_unavailable(self) -> str | None:
        """What compiling for it takes that is not installed, and how to install it; None where all is."""

    @abstractmethod
    def mesh(self) -> Mesh:
        """Of one such chip; the same each time, for devices of two descriptions are two devices."""

    def why_no_value(self, knob: str, value: Value) -> str | None:
        if knob == "precision.matmul_inputs" and multiplied(str(value), "bfloat16") not in self.peak_flops_per_s:
            return f"{self.name} multiplies no {value} numbers: it would only round to them, and be slower for it"
        return why_no_value_for(knob, value, self.platform)

    def why_not(self, candidate: Candidate) -> str | None:
        return why_no_value_of(candidate, self)

    def target(self, cache: Path, measure_peaks: MeasurePeaks) -> Target:
        """The datasheet's figures; of a chip that is not attached."""
        return Target(
            name=self.name,
            platform=self.platform,
            source=self.source,
            peak_flops_per_s=self.peak_flops_per_s,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            capacity_bytes=self.capacity_bytes,
            cores=self.cores,
            overhead_s=self.overhead_s,
            cache_bytes=self.cache_bytes,
            power_w=self.power_w,
            attached=False,
        )

    def compile(
        self, function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any] | None = None
    ) -> jax.stages.Compiled:
        """A function of these arrays or their specs, jitted or not, compiled for the chip.

        Raises:
            Rejected: the compiler refuses it, or an option.
        """
        mesh = self.mesh()
        whole = NamedSharding(mesh, PartitionSpec())
        specs = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=whole), tuple(arguments))
        jitted: Any = function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)
        try:
            with jax.set_mesh(mesh), self.exact():
                lowered = jitted.trace(*specs).lower(lowering_platforms=(self.lowered_for,))
                return lowered.compile(compiler_options=dict(options or {}) or None)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            raise Rejected(f"does not compile for {self.name}: {first_line(error)[:500]}") from None

    def exact(self) -> AbstractContextManager[None]:
        """Where products are lowered as those of an attached chip are."""
        return jax.default_matmul_precision(_EXACT)


def accelerator(name: str) -> Accelerator:
    """The GPU or TPU of that name.

    Raises:
        UserError: there is none.
    """
    chip = TARGETS[name]
    if not isinstance(chip, Accelerator):
        raise UserError(f"the target {name!r} is no GPU or TPU")
    return chip


@functools.cache
def one_chip(platform: str, name: str, **description: str) -> Mesh:
    """The first chip of a topology that is named or described to the plugin, not attached."""
    found = topologies.get_topology_desc(name, platform, **description)
    return Mesh(np.array(found.devices[:1]), ("chip",))
