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
