"""Where a search for a chip does its work: on the chip, where one of its kind is attached to this machine, or else in
processes that only compile for it. This is decided here and nowhere else."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cosearch.core.errors import UserError
from cosearch.core.target import Target
from cosearch.measure.process import Worker
from cosearch.targets import TARGETS, MeasurePeaks
from cosearch.targets.accelerator import ENVIRONMENT, Accelerator

_PROBE_S = 120.0


@dataclass(frozen=True)
class Workplace:
    """For the chip `name`: whether one is `attached`, and the environment of all workers."""

    name: str
    attached: bool
    environment: Mapping[str, str]

    @classmethod
    def of(cls, name: str) -> "Workplace":
        """On this machine.

        Raises:
            UserError: the chip is not attached, and what compiling for it takes is not installed.
            Rejected: no process here says what JAX runs on.
        """
        chip = TARGETS[name]
        if not isinstance(chip, Accelerator):
            return cls(name, True, chip.environment)
        if why := chip.why_unavailable():
            raise UserError(f"target={name}: compiling for it takes {why}")
        with Worker() as probe:
            attached = probe.call("device", {}, _PROBE_S)["kind"] == chip.kind
        return cls(name, attached, chip.environment if attached else ENVIRONMENT)

    def worker(self) -> Worker:
        """A new one."""
        return Worker(self.environment)

    def target(self, cache: Path, measure_peaks: MeasurePeaks) -> Target:
        """What the chip can do at best, and whether it is here."""
        return replace(TARGETS[self.name].target(cache, measure_peaks), attached=self.attached)
