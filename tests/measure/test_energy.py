"""Counters of energy: RAPL's files as Linux lays them out, and what is made of a counter's updates."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cosearch.core.errors import Rejected
from cosearch.measure import energy
from cosearch.measure.energy import COUNTERS, NVML, RAPL, joules_a_run, sample, why_uncounted

NOBODY = 65534
RANGE_UJ = 262_143_328_850
ZONES = {
    "intel-rapl:0": "package-0",
    "intel-rapl:0:0": "core",
    "intel-rapl:0:1": "dram",
    "intel-rapl:1": "package-1",
    "intel-rapl:2": "psys",
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """/sys/class/powercap of a machine of two sockets, that anybody may read."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        for zone, name in ZONES.items():
            (folder / zone).mkdir()
            (folder / zone / "name").write_text(f"{name}\n")
            (folder / zone / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
            write(folder, zone, 1_000_000)
        yield folder


def write(folder: Path, zone: str, microjoules: int) -> None:
    (folder / zone / "energy_uj").write_text(f"{microjoules}\n")


def test_the_packages_count_together_and_their_parts_not_again(folder: Path):
    counter = RAPL(folder)
    assert counter.why_unavailable() is None
    joules = counter.start()
    assert joules() == 0
    for zone in ZONES:
        write(folder, zone, 3_500_000)
    assert joules() == pytest.approx(2 * 2.5)


def test_a_counter_starts_again_after_its_range(folder: Path):
    write(folder, "intel-rapl:0", RANGE_UJ - 1_000_000)
    joules = RAPL(folder).start()
    write(folder, "intel-rapl:0", 500_000)
    assert joules() == pytest.approx(1.5)


def test_what_only_root_may_read_is_not_available_and_says_how_to_change_that(folder: Path):
    path = folder / "intel-rapl:0" / "energy_uj"
    path.chmod(0o400)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    else:
        path.chmod(0)
    try:
        why = RAPL(folder).why_unavailable()
    finally:
        if is_root:
            os.seteuid(0)
    assert why == f"{path} may be read by root alone: sudo chmod a+r {folder}/intel-rapl:*/energy_uj"


def test_a_machine_without_counters_says_so(folder: Path):
    for zone in ("intel-rapl:0", "intel-rapl:1"):
        shutil.rmtree(folder / zone)
    for empty in (folder, folder / "nowhere"):
        assert (
            RAPL(empty).why_unavailable() == f"Linux counts no processor's energy: no package in {empty}/intel-rapl:*"
        )


def test_files_that_hold_no_number_are_none(folder: Path):
    (folder / "intel-rapl:1" / "max_energy_range_uj").write_text("\n")
    assert "the processor's energy cannot be read: " in str(RAPL(folder).why_unavailable())


@pytest.mark.parametrize("counter", COUNTERS.values(), ids=lambda counter: type(counter).__name__)
def test_a_counter_of_this_machine_counts_or_says_in_one_line_why_not(counter: energy.EnergyCounter):
    why = counter.why_unavailable()
    if why is None:
        joules = counter.start()
        first = joules()
        assert 0 <= first <= joules()
    else:
        assert why and "\n" not in why


def test_gpus_need_a_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as where it is not installed
    assert NVML().why_unavailable() == "the package nvidia-ml-py is not installed: pip install 'cosearch[nvml]'"


def test_there_is_no_counter_of_tpus():
    assert why_uncounted("tpu") == "nothing is known that counts the energy of a tpu"


@dataclass
class Machine:
    """Draws `run_j` a run, which takes `run_s` by its own clock; its counter is updated every `update_s`."""

    run_j: float
    run_s: float
    update_s: float
    runs: int = 0
    looks: list[int] = field(default_factory=list)

    def why_unavailable(self) -> None:
        return None

    def start(self) -> Callable[[], float]:
        before = self._counted()

        def joules() -> float:
            self.looks.append(self.runs)
            return self._counted() - before

        return joules

    def _counted(self) -> float:
        seconds = self.runs * self.run_s
        return self.run_j / self.run_s * self.update_s * (seconds // self.update_s)

    def run(self) -> None:
        self.runs += 1

    def perf_counter(self) -> float:
        return self.runs * self.run_s


@pytest.mark.parametrize("update_s", [0.001, 0.05, 0.1])
@pytest.mark.parametrize("run_s", [1e-5, 1e-3, 0.3])
def test_energy_is_counted_from_update_to_update(monkeypatch: pytest.MonkeyPatch, run_s: float, update_s: float):
    machine = Machine(0.25, run_s, update_s)
    monkeypatch.setattr(energy, "time", machine)
    found = sample(machine.run, machine)
    assert machine.runs * run_s >= 1 and len(found.joules) == len(found.runs) >= 20
    value, (low, high) = joules_a_run(found.joules, found.runs)
    assert value == pytest.approx(0.25, rel=0.02)
    assert low <= value <= high
    looks = [later - before for before, later in zip(machine.looks, machine.looks[1:], strict=False)]
    assert min(looks) * run_s >= min(0.004, run_s), "it is not looked at so often that this is what is measured"


def test_a_counter_that_stands_still_is_none(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(0.25, 1e-3, 6.0)
    monkeypatch.setattr(energy, "time", machine)
    with pytest.raises(Rejected, match=r"^no energy: the counter was updated \d times in 10 s$"):
        sample(machine.run, machine)


def test_slow_runs_are_waited_for(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(20.0, 4.0, 0.1)
    monkeypatch.setattr(energy, "time", machine)
    found = sample(machine.run, machine)
    assert len(found.joules) == 3
    assert joules_a_run(found.joules, found.runs)[0] == pytest.approx(20.0, rel=0.05)
    machine = Machine(80.0, 16.0, 0.1)
    monkeypatch.setattr(energy, "time", machine)
    with pytest.raises(Rejected, match=r"^no energy: runs are too long: 2 took 32 s$"):
        sample(machine.run, machine)


def test_it_can_be_tried_alone():
    command = [sys.executable, "-m", "cosearch.measure.energy"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert told["platform"] == "cpu"
    if "why_uncounted" in told:
        assert told["why_uncounted"] == why_uncounted("cpu")
    else:
        assert told["run_j"] > 0 and told["updates"] >= 3 and told["interval"][0] <= told["run_j"]
