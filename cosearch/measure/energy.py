"""What runs cost in energy, where the machine counts it. `python -m cosearch.measure.energy` shows it.

A counter counts all that its chip draws, whatever for: what it draws idle is not subtracted, and on a processor what
other processes have it do is in it. The processor's share in work that is done on a GPU is not.

To add a counter, write a class with the methods of `EnergyCounter` and name it in `COUNTERS`.
"""

import ctypes
import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cosearch.core.errors import Rejected

_WARM_UP_S = 0.3
_LEAST_S, _MOST_S, _LONGEST_S = 1.0, 10.0, 30.0
_LEAST_UPDATES, _FEWEST_UPDATES = 20, 3
"""NVML's counter is updated about every 20 to 100 ms, RAPL's every millisecond."""
_FILES = ("energy_uj", "max_energy_range_uj")
_BLOCK_S = 5e-3
"""Of runs between two looks at a counter, which take some time and power themselves."""

Joules = Callable[[], float]
"""How many were drawn since the counter was started."""


class EnergyCounter(Protocol):
    """What counts the joules that a chip draws."""

    def why_unavailable(self) -> str | None:
        """Why there is none here, in one line; None where there is one."""
        ...

    def start(self) -> Joules:
        """Count from now on; only where it is available."""
        ...


@dataclass(frozen=True)
class RAPL:
    """Of processors: Running Average Power Limit, all sockets together, as Linux tells it
    (https://docs.kernel.org/power/powercap/powercap.html). The memory's own chips are not in it."""

    folder: Path = Path("/sys/class/powercap")

    def why_unavailable(self) -> str | None:
        packages = self._packages()
        if not packages:
            return f"Linux counts no processor's energy: no package in {self.folder}/intel-rapl:*"
        try:
            for path in (package / name for package in packages for name in _FILES):
                _number(path)
        except PermissionError as error:
            return f"{error.filename} may be read by root alone: sudo chmod a+r {self.folder}/intel-rapl:*/energy_uj"
        except (OSError, ValueError) as error:
            return f"the processor's energy cannot be read: {error}"
        return None

    def start(self) -> Joules:
        packages = self._packages()
        ranges = [_number(package / "max_energy_range_uj") for package in packages]
        before = [_number(package / "energy_uj") for package in packages]

        def joules() -> float:
            now = [_number(package / "energy_uj") for package in packages]
            # After its range, which takes minutes at least, a counter starts from 0 again.
            return 1e-6 * sum((b - a) % whole for a, b, whole in zip(before, now, ranges, strict=True))

        return joules

    def _packages(self) -> list[Path]:
        """Each socket's folder: what is beside them is a part of one, or the whole machine."""
        found = sorted(self.folder.glob("intel-rapl:*"))
        return [zone for zone in found if _text(zone / "name").startswith("package")]


@dataclass(frozen=True)
class NVML:
    """Of NVIDIA's GPUs, Volta and later: the board's total energy (`nvmlDeviceGetTotalEnergyConsumption`,
    https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html), its memory and regulators included."""

    def why_unavailable(self) -> str | None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return "the package nvidia-ml-py is not installed: pip install 'cosearch[nvml]'"
        try:
            gpu = self._gpu(nvml)
            nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
            if _in_parts(nvml, gpu):
                return "the GPU is in parts (MIG), and what it counts is the energy of all of them"
        except (OSError, nvml.NVMLError) as error:
            return f"the GPU's energy cannot be read: {error}"
        return None

    def start(self) -> Joules:
        nvml = importlib.import_module("pynvml")
        gpu = self._gpu(nvml)
        before = nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
        return lambda: 1e-3 * (nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) - before)

    def _gpu(self, nvml: Any) -> Any:
        """NVML's handle of the first GPU that CUDA shows to this process, which JAX runs on. NVML itself knows nothing
        of CUDA_VISIBLE_DEVICES and may count the GPUs in another order: what they agree on is where it is plugged in.
        """
        cuda, place = ctypes.CDLL("libcuda.so.1"), ctypes.create_string_buffer(32)
        if code := cuda.cuInit(0) or cuda.cuDeviceGetPCIBusId(place, len(place), 0):
            raise OSError(f"CUDA shows no GPU (error {code})")
        nvml.nvmlInit()
        return nvml.nvmlDeviceGetHandleByPciBusId(place.value)


COUNTERS: dict[str, EnergyCounter] = {"cpu": RAPL(), "gpu": NVML()}
"""By JAX's name for the kind of device."""


def why_uncounted(platform: str) -> str | None:
    """Why the energy of this kind of device cannot be counted here, in one line; None where it can."""
    counter = COUNTERS.get(platform)
    return counter.why_unavailable() if counter else f"nothing is known that counts the energy of a {platform}"


@dataclass(frozen=True)
class Counted:
    """Joules between each update of a counter and the next, and the runs that ended meanwhile."""

    joules: Sequence[float]
    runs: Sequence[int]


def sample(run: Callable[[], Any], counter: EnergyCounter) -> Counted:
    """Count the energy of runs, after a warm-up, over at least a second and 20 updates of the counter, or 10 seconds;
    longer, where each run takes seconds.

    Raises:
        Rejected: the counter was hardly ever updated, or runs are too long.
    """
    count, start = 0, time.perf_counter()
    while time.perf_counter() < start + _WARM_UP_S:
        run()
        count += 1
    block = max(1, round(count * _BLOCK_S / (time.perf_counter() - start)))
    joules, runs, before, done = [], [], 0.0, -1  # what ended before the first update began at an unknown time
    drawn, start, looks, updates = counter.start(), time.perf_counter(), 0, 0
    while True:
        for _ in range(block):
            run()
        looks += 1
        now, spent_s = drawn(), time.perf_counter() - start
        done += block if done >= 0 else 0
        if now != before:
            updates += 1
            if done > 0:
                joules.append(now - before)
                runs.append(done)
            before, done = now, 0
        if len(joules) >= _LEAST_UPDATES and spent_s >= _LEAST_S:
            break
        if spent_s >= _MOST_S and len(joules) >= _FEWEST_UPDATES:
            break
        if spent_s >= _MOST_S and updates < looks:  # it was not the runs that were waited for
            raise Rejected(f"no energy: the counter was updated {updates} times in {spent_s:.0f} s")
        if spent_s >= _LONGEST_S:
            raise Rejected(f"no energy: runs are too long: {looks * block} took {spent_s:.0f} s")
    return Counted(joules, runs)


def joules_a_run(joules: Sequence[float], runs: Sequence[float], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """The joules of a run, of all that were counted together, with their 90 % bootstrap interval."""
    pairs = np.array([joules, runs], float)
    draws = np.random.default_rng(seed).integers(0, pairs.shape[1], (400, pairs.shape[1]))
    drawn, done = pairs[:, draws].sum(axis=2)
    low, high = np.quantile(drawn / done, [0.05, 0.95])
    return float(pairs[0].sum() / pairs[1].sum()), (float(low), float(high))


def _in_parts(nvml: Any, gpu: Any) -> bool:
    try:
        return nvml.nvmlDeviceGetMigMode(gpu)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    except nvml.NVMLError:
        return False  # it cannot be


def _number(path: Path) -> int:
    return int(path.read_text())


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def main() -> None:
    """Print, as one JSON object, what a product of matrices costs on JAX's default device, or why nobody counts it."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    told: dict[str, Any] = {"device": device.device_kind, "platform": device.platform}
    if why := why_uncounted(device.platform):
        print(json.dumps(told | {"why_uncounted": why}))
        return
    counter = COUNTERS[device.platform]
    matrix, product = jnp.ones((4096, 4096), jnp.bfloat16), jax.jit(lambda a: a @ a)
    start, drawn = time.perf_counter(), counter.start()
    time.sleep(2)
    told["idle_w"] = drawn() / (time.perf_counter() - start)
    seconds, runs = time.perf_counter(), 0

    def run() -> None:
        nonlocal runs
        jax.block_until_ready(product(matrix))
        runs += 1

    found = sample(run, counter)
    seconds = (time.perf_counter() - seconds) / runs
    value, interval = joules_a_run(found.joules, found.runs)
    told |= {"run_s": seconds, "run_j": value, "interval": interval, "run_w": value / seconds}
    print(json.dumps(told | {"updates": len(found.joules), "runs": sum(found.runs)}))


if __name__ == "__main__":
    main()
