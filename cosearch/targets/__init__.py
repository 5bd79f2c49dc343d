"""Chips, one per file. To add one, write `<name>.py` here and register a `Chip`; `cosearch.testing.check_target` then
tests it.

The chip of a search is its target. One that is at hand may be measured: it gets the cache folder and a way to run
`measure/peaks.py` in a worker. One that is not is a literal from its datasheet, cited.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cosearch.core.candidate import Candidate
from cosearch.core.registry import Registry
from cosearch.core.target import Target
from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS
from cosearch.schedule import Schedule

MeasurePeaks = Callable[[], Mapping[str, Any]]


class Chip(Protocol):
    """What a file of this folder registers."""

    def why_not(self, candidate: Candidate) -> str | None:
        """Why the chip cannot run a candidate as it says, only emulate it; None where it can."""
        ...

    def target(self, cache: Path, measure_peaks: MeasurePeaks) -> Target:
        """What it can do at best."""
        ...


TARGETS: Registry[Chip] = Registry("target", __name__)


_OPTION = re.compile(r"xla_(cpu|gpu|tpu)_")
"""Options of one kind of device's compiler; others take them and do nothing."""


def why_not_for(candidate: Candidate, platform: str) -> str | None:
    """Why a kernel or compiler option that a candidate's schedule names is not for this kind of device, or not to be
    had here."""
    for knob, kernels in (("matmul", MATMUL_KERNELS), ("attention", ATTENTION_KERNELS)):
        name = candidate.schedule.get(knob)
        if name in kernels:
            kernel = kernels[str(name)]
            if platform not in kernel.platforms:
                return f"the kernel {name!r} is for {', '.join(sorted(kernel.platforms))}"
            if why := kernel.why_unavailable():
                return f"the kernel {name!r} is not to be had: {why}"
    schedule = Schedule.of(candidate.schedule)
    if platform != "tpu" and (schedule.boundary, schedule.fuse_limit) != ("default", "none"):
        return "schedule.boundary and schedule.fuse_limit mean something to the compiler for TPUs alone"
    return why_no_options(schedule.options, platform)


def why_no_options(names: Iterable[str], platform: str) -> str | None:
    """Why one of these compiler options is not for this kind of device."""
    for name in names:
        found = _OPTION.match(name)
        if found and found[1] != platform:
            return f"the compiler option {name!r} is for {found[1]}"
    return None
