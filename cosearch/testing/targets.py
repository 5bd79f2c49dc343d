"""The contract of targets: finite peaks with a source, measured once, and why they cannot run what they cannot."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from cosearch.core.target import Target
from cosearch.targets import TARGETS, MeasurePeaks
from cosearch.targets.accelerator import Accelerator
from cosearch.targets.gpu import GPU
from cosearch.testing.common import require
from cosearch.testing.proposers import KNOBS, reasons, small_space


def check_target(name: str, folder: Path, measure_peaks: MeasurePeaks) -> None:
    """Check the target `name`, with `folder` as the cache and `measure_peaks` for what it may want to be measured."""
    calls: list[int] = []

    def counted() -> Mapping[str, Any]:
        calls.append(1)
        return measure_peaks()

    chip = TARGETS[name]
    for candidate, why in reasons(chip.why_not, small_space(KNOBS)).items():
        for knob, value in candidate.point.items():
            found = chip.why_no_value(knob, value)
            require(found is None or why is not None, f"{knob}={value!r}, which it is said never to run, is refused")
    target = chip.target(folder, counted)
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
    if isinstance(chip, Accelerator):
        _check_accelerator(chip, target)
    read = Target.from_json(json.loads(json.dumps(target.to_json(), allow_nan=False)))
    require(read == target, f"a target survives JSON: {target} and {read}")
    require(TARGETS[name].target(folder, counted) == target, "a target is the same when it is asked for again")
    require(len(calls) <= 1, f"peaks are measured once and kept, not measured {len(calls)} times")


def _check_accelerator(chip: Accelerator, target: Target) -> None:
    """A literal from a datasheet is whole, and its figures can be of one chip."""
    require(not target.attached, "whether it is attached is said of a machine, not of a chip")
    require(bool(chip.kind), "it has JAX's name of such a device, by which one that is attached is known")
    peaks = chip.peak_flops_per_s
    require({"float32", "bfloat16", "int8"} <= peaks.keys(), "its peaks are known for float32, bfloat16 and int8")
    widest = sorted(peaks, key=lambda dtype: -jnp.finfo(dtype).bits if "float" in dtype else -jnp.iinfo(dtype).bits)
    rising = [peaks[dtype] for dtype in widest]
    require(rising == sorted(rising), f"narrower numbers are multiplied no slower: {dict(peaks)}")
    require(0 < chip.cache_bytes < chip.capacity_bytes, "its caches hold something, and less than its memory")
    require(chip.power_w is None or chip.power_w > 0, "what it draws is above 0, or unknown")
    why = chip.why_unavailable()
    require(why is None or "pip install" in why, f"what is missing to compile for it can be installed: {why}")
    if isinstance(chip, GPU):
        require(chip.description.count("{") == chip.description.count("}"), "XLA can be told of it")
