"""Chips, one per file. To add one, write `<name>.py` here and register a `Chip`; `cosearch.testing.check_target` then
tests it.

The chip of a search is its target. One that is at hand may be measured: it gets the cache folder and a way to run
`measure/peaks.py` in a worker. One that is not is a literal from its datasheet, cited.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cosearch.core.candidate import Candidate
from cosearch.core.registry import Registry
from cosearch.core.target import Target
from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS

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


def why_no_kernels(candidate: Candidate, platform: str) -> str | None:
    """Why the kernels that a candidate's schedule names are not for this kind of device, or not to be had here."""
    for knob, kernels in (("matmul", MATMUL_KERNELS), ("attention", ATTENTION_KERNELS)):
        name = candidate.schedule.get(knob)
        if name in kernels:
            kernel = kernels[str(name)]
            if platform not in kernel.platforms:
                return f"the kernel {name!r} is for {', '.join(sorted(kernel.platforms))}"
            if why := kernel.why_unavailable():
                return f"the kernel {name!r} is not to be had: {why}"
    return None
