"""The processor this runs on. Its peaks are measured once and kept in the cache folder, by processor and jaxlib."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from cosearch.core.candidate import Candidate, Value, content_hash
from cosearch.core.files import write_json
from cosearch.core.target import Target
from cosearch.measure.fingerprint import fingerprint
from cosearch.targets import TARGETS, MeasurePeaks, why_no_value_for, why_no_value_of

_TOLD = ("level", "shared_cpu_list", "size")
"""Of a cache, in a file each."""


class CPU:
    """Measured peaks; capacity is the machine's memory."""

    environment: ClassVar[Mapping[str, str]] = {"JAX_PLATFORMS": "cpu"}  # also where a GPU is attached

    def why_no_value(self, knob: str, value: Value) -> str | None:
        if (knob, value) == ("precision.matmul_inputs", "float8_e4m3"):
            return "this processor multiplies no float8 numbers: it would only round to them, and be slower for it"
        return why_no_value_for(knob, value, "cpu")

    def why_not(self, candidate: Candidate) -> str | None:
        return why_no_value_of(candidate, self)

    def target(self, cache: Path, measure_peaks: MeasurePeaks) -> Target:
        names = ("processor", "cores", "threads", "jaxlib", "compiler", "system")
        versions = {name: fingerprint()[name] for name in names}
        path = cache / "targets" / f"cpu-{content_hash(versions)}.json"
        if path.is_file():
            peaks = json.loads(path.read_text())["peaks"]
        else:
            peaks = dict(measure_peaks())
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"versions": versions, "peaks": peaks})
        return Target(
            name="cpu",
            platform=peaks["platform"],
            source=f"measured on {versions['processor']}, {versions['cores']} cores",
            peak_flops_per_s=peaks["peak_flops_per_s"],
            bandwidth_bytes_per_s=peaks["bandwidth_bytes_per_s"],
            capacity_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            cache_bytes=_last_level_cache_bytes(),
            cores=versions["cores"],
            overhead_s=peaks["overhead_s"],
        )


def _last_level_cache_bytes() -> int:
    """The last level of all cores' caches together, as Linux tells; 0 where it tells of none."""
    found: dict[int, dict[str, int]] = {0: {"": 0}}  # by level and by the cores that share one
    for core in os.sched_getaffinity(0):
        for cache in Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*"):
            try:
                level, shared, size = ((cache / name).read_text().strip() for name in _TOLD)
            except OSError:
                continue  # not every processor tells the size
            number, unit = int(size[:-1]), {"K": 2**10, "M": 2**20, "G": 2**30}[size[-1]]
            found.setdefault(int(level), {})[shared] = number * unit
    return sum(found[max(found)].values())


TARGETS.register("cpu")(CPU())
