"""The contract of targets: finite peaks with a source, measured once, and why they cannot run what they cannot."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from cosearch.core.target import Target
from cosearch.targets import TARGETS, MeasurePeaks
from cosearch.testing.common import require
from cosearch.testing.proposers import KNOBS, reasons, small_space


def check_target(name: str, folder: Path, measure_peaks: MeasurePeaks) -> None:
    """Check the target `name`, with `folder` as the cache and `measure_peaks` for what it may want to be measured."""
    calls: list[int] = []

    def counted() -> Mapping[str, Any]:
        calls.append(1)
        return measure_peaks()

    reasons(TARGETS[name].why_not, small_space(KNOBS))
    target = TARGETS[name].target(folder, counted)
    require(target.name == name, f"a target bears its registered name {name!r}, not {target.name!r}")
    require(bool(target.platform and target.source), "a target names JAX's platform, and the source of its figures")
    require(bool(target.peak_flops_per_s), "a target has a peak for one dtype at least")
    for dtype in target.peak_flops_per_s:
        jnp.dtype(dtype)
    figures = {f"peak_flops_per_s of {dtype}": peak for dtype, peak in target.peak_flops_per_s.items()} | {
        field: getattr(target, field) for field in ("bandwidth_bytes_per_s", "capacity_bytes", "cores", "overhead_s")
    }
    for what, figure in figures.items():
        require(math.isfinite(figure) and figure > 0, f"{what} is finite and above 0, not {figure}")
    read = Target.from_json(json.loads(json.dumps(target.to_json(), allow_nan=False)))
    require(read == target, f"a target survives JSON: {target} and {read}")
    require(TARGETS[name].target(folder, counted) == target, "a target is the same when it is asked for again")
    require(len(calls) <= 1, f"peaks are measured once and kept, not measured {len(calls)} times")
