"""Chips, one per file. To add one, write `<name>.py` here and register a `Chip`; `cosearch.testing.check_target` then
tests it. A GPU or TPU is a literal from its datasheet, cited: `gpu.py` and `tpu.py` have the rest.

The chip of a search is its target. The processor that this runs on (`cpu.py`) is measured. An accelerator
(`accelerator.py`) is, too, where one of its kind is attached; where none is, models are compiled for it all the same,
and their latencies predicted.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from cosearch.core.candidate import Candidate, Value
from cosearch.core.registry import Registry
from cosearch.core.target import Target
from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS
from cosearch.schedule import KNOBS

MeasurePeaks = Callable[[], Mapping[str, Any]]


class Chip(Protocol):
    """What a file of this folder registers."""

    environment: ClassVar[Mapping[str, str]]
    """Of the processes that run candidates on it."""

    def why_no_value(self, knob: str, value: Value) -> str | None:
        """Why the chip runs no candidate with this value of a knob, which is then left out of a space; None where it
        does."""
        ...

    def why_not(self, candidate: Candidate) -> str | None:
        """Why the chip cannot run a candidate as it says, only emulate it; None where it can."""
        ...

    def target(self, cache: Path, measure_peaks: MeasurePeaks) -> Target:
        """What it can do at best."""
        ...


TARGETS: Registry[Chip] = Registry("target", __name__)


_OPTION = re.compile(r"xla_(cpu|gpu|tpu|llvm)_")
_READ_BY = {"cpu": ("cpu",), "gpu": ("gpu",), "tpu": ("tpu",), "llvm": ("cpu", "gpu")}
"""Which kinds of device's compilers read an option; others take it and do nothing."""
_KERNELS = {"schedule.matmul": MATMUL_KERNELS, "schedule.attention": ATTENTION_KERNELS}
_OF_TPUS = ("schedule.boundary", "schedule.fuse_limit")


def why_no_value_for(knob: str, value: Value, platform: str) -> str | None:
    """Why a kernel, a compiler option or a freedom of the compiler is not for this kind of device, or not to be had
    here."""
    if knob in _KERNELS and value in _KERNELS[knob]:
        kernel = _KERNELS[knob][str(value)]
        if platform not in kernel.platforms:
            return f"the kernel {value!r} is for {', '.join(sorted(kernel.platforms))}"
        if why := kernel.why_unavailable():
            return f"the kernel {value!r} is not to be had: {why}"
    if knob in _OF_TPUS and platform != "tpu" and value != KNOBS[knob.partition(".")[2]].default:
        return f"{knob} means something to the compiler for TPUs alone"
    if knob == "schedule.compiler_options" and isinstance(value, tuple):
        for option in map(str, value):
            found = _OPTION.match(option)
            if found and platform not in _READ_BY[found[1]]:
                return f"the compiler option {option.partition('=')[0]!r} is for {', '.join(_READ_BY[found[1]])}"
    return None


def why_no_value_of(candidate: Candidate, chip: Chip) -> str | None:
    """Why the chip runs nothing with one of the values of a candidate."""
    return next((why for knob, value in candidate.point.items() if (why := chip.why_no_value(knob, value))), None)
