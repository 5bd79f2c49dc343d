"""What a worker process can be asked for. Arguments and results are plain JSON data."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cosearch import axes
from cosearch.architecture.decoder import plain_decoder
from cosearch.artifact.save import save_artifact
from cosearch.core.candidate import Candidate
from cosearch.core.errors import Rejected, first_line
from cosearch.core.workload import Workload
from cosearch.latency.hlo import HloFeatures
from cosearch.measure import energy, operation, peaks, timing
from cosearch.measure.bench import Bench, Compiled, compile_point, device_canary, memory_bytes, steps
from cosearch.measure.tune import tune_all
from cosearch.precision import Precision
from cosearch.quality import Recipe, corpus
from cosearch.quality.evaluate import evaluate
from cosearch.quality.serve import served
from cosearch.schedule import Schedule
from cosearch.schedule.program import Compile, Program, for_default_device
from cosearch.targets.accelerator import accelerator

_TUNE_S = 3.0
"""For the kernels of one candidate; what was tuned once serves all that come after."""

Progress = Callable[[str, float], None]
Task = Callable[..., Mapping[str, Any]]


class Workbench:
    """What a worker keeps between tasks: the candidate at hand, the features of what was compiled of it for a chip that
    is not here, the canary, and the corpus."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.features: tuple[str, list[HloFeatures]] = ("", [])
        self._corpus: corpus.Corpus | None = None

    @cached_property
    def canary(self) -> timing.Canary:
        return device_canary()

    def corpus(self, name: str) -> corpus.Corpus:
        if self._corpus is None or self._corpus.name != name:
            self._corpus = corpus.load(name)
        return self._corpus


def measure_peaks(work: Workbench, progress: Progress) -> dict[str, Any]:
    """The peaks of the default device (`measure/peaks.py`)."""
    return peaks.measure(progress)


def tell_device(work: Workbench, progress: Progress) -> dict[str, Any]:
    """What JAX runs on here."""
    device = jax.devices()[0]
    return {"platform": device.platform, "kind": device.device_kind}


def check_options(
    work: Workbench, progress: Progress, option_sets: Sequence[Sequence[str]], absent: str | None = None
) -> dict[str, Any]:
    """Which sets of compiler options the installed XLA refuses, and why; by compiling one operation with each, for the
    chip `absent` where one is named."""
    refused, one = {}, [jax.ShapeDtypeStruct((), np.float32)]
    for index, options in enumerate(option_sets):
        schedule = Schedule(compiler_options=tuple(options))
        try:
            _compiler(absent)(jax.jit(lambda x: x + 1), one, schedule.options)
        except (Rejected, ValueError, TypeError) as error:
            refused[str(index)] = first_line(error)[:300]
    return {"refused": refused}


def compile_candidate(
    work: Workbench, progress: Progress, point: Mapping[str, Any], workload: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Compile a candidate for every operating point, and count the bytes it takes in memory; `seed` draws its weights
    and what it is verified with."""
    candidate, start = Candidate.from_point(point), time.perf_counter()
    tune_all(axes.native_products(candidate, Workload.from_json(workload)), _TUNE_S)
    programs = work.bench.compile(candidate, Workload.from_json(workload), seed)
    return {
        "compile_s": time.perf_counter() - start,
        "copied_bytes": max(compiled.copied_bytes for compiled in programs),
        **_memory([(compiled.program, compiled.executable) for compiled in programs]),
    }


def compile_for_absent(
    work: Workbench, progress: Progress, point: Mapping[str, Any], workload: Mapping[str, Any], absent: str
) -> dict[str, Any]:
    """As `compile_candidate`, for a chip that is not here; nothing of it is run."""
    candidate, start = Candidate.from_point(point), time.perf_counter()
    work.features = "", []
    model, options = axes.decoder(candidate), Schedule.of(candidate.schedule).options
    points = Workload.from_json(workload).points
    made = [compile_point(model, one, options, _compiler(absent)) for one in points]
    compile_s = time.perf_counter() - start
    features = [HloFeatures.of(executable, program.cache) for program, executable, _ in made]
    work.features = candidate.uid, features
    return {
        "compile_s": compile_s,
        "copied_bytes": max(one.copied_bytes for one in features),
        **_memory([(program, executable) for program, executable, _ in made]),
    }


def tell_features(work: Workbench, progress: Progress, point: Mapping[str, Any]) -> dict[str, Any]:
    """The features of the candidate that was compiled for a chip that is not here, by operating point."""
    candidate, (uid, features) = Candidate.from_point(point), work.features
    if uid != candidate.uid:
        raise Rejected(f"candidate {candidate.uid} is not compiled in this worker")
    return {"features": [one.to_json() for one in features]}


def verify_portable(
    work: Workbench, progress: Progress, point: Mapping[str, Any], workload: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Verify the same mathematics as XLA alone runs it here, where the candidate's own programs cannot run."""
    candidate = Candidate.from_point(point)
    work.bench.compile(candidate, Workload.from_json(workload), seed, portable=True)
    return {"portable_error": max(result.ratio for result in work.bench.verify(candidate))}


def verify_candidate(work: Workbench, progress: Progress, point: Mapping[str, Any]) -> dict[str, Any]:
    """Verify the compiled candidate against float64; the error is relative to what its formats allow."""
    candidate = _at_hand(work, point)
    verified = work.bench.verify(candidate)
    return {"numerical_error": max(result.ratio for result in verified)}


def measure_candidate(
    work: Workbench, progress: Progress, point: Mapping[str, Any], seconds: float, cold_bytes: int
) -> dict[str, Any]:
    """Seconds of each run of the compiled candidate, or of each step of a run, by operating point, about `seconds` for
    each, and which part of them was contended."""
    _at_hand(work, point)
    timed = [timing.sample(steps([one], cold_bytes)[0], seconds, work.canary) for one in work.bench.programs]
    programs = work.bench.programs
    samples = [_each_step(one.sides[0], compiled) for one, compiled in zip(timed, programs, strict=True)]
    return {"samples_s": samples, "contended": [one.contended for one in timed]}


def time_operation(
    work: Workbench, progress: Progress, kind: str, columns: Mapping[str, Any], seconds: float, cold_bytes: int
) -> dict[str, Any]:
    """Seconds of one operation, and which part of them was contended."""
    timed = operation.time_operation(kind, columns, cold_bytes, seconds, work.canary)
    return {"samples_s": timed.sides[0], "contended": timed.contended}


def tell_energy_counter(work: Workbench, progress: Progress) -> dict[str, Any]:
    """Why the energy of the device that JAX runs on cannot be counted, or nothing where it can."""
    return {"why_uncounted": energy.why_uncounted(jax.devices()[0].platform)}


def count_energy(work: Workbench, progress: Progress, point: Mapping[str, Any], cold_bytes: int) -> dict[str, Any]:
    """Joules between updates of the device's counter, by operating point, and the steps that the compiled candidate
    took meanwhile."""
    _at_hand(work, point)
    counter, programs = energy.COUNTERS[jax.devices()[0].platform], work.bench.programs
    found = [energy.sample(steps([one], cold_bytes)[0], counter) for one in programs]
    taken = [[one.program.steps * runs for runs in each.runs] for one, each in zip(programs, found, strict=True)]
    return {"joules": [list(each.joules) for each in found], "steps": taken}


def evaluate_quality(
    work: Workbench, progress: Progress, point: Mapping[str, Any], recipe: Mapping[str, Any], corpus: str, cache: str
) -> dict[str, Any]:
    """Train the candidate's model, as far as that was not done before, and evaluate it as it is served."""
    candidate, quality = Candidate.from_point(point), Recipe.from_json(recipe)
    text = work.corpus(corpus)
    model = plain_decoder(axes.served_shape(candidate), Precision.of(candidate.precision))
    return evaluate(model, served(candidate, quality, text, Path(cache), progress).params(model), quality, text)


def compare_candidates(
    work: Workbench,
    progress: Progress,
    points: Sequence[Mapping[str, Any]],
    workload: Mapping[str, Any],
    rounds: int,
    seconds: float,
    cold_bytes: int,
) -> dict[str, Any]:
    """Seconds of each candidate, interleaved in random order, by operating point; all are verified first. An operating
    point has so many `rounds`, or as many as fit in so many `seconds`."""
    benches = []
    for point in points:
        bench, candidate = Bench(), Candidate.from_point(point)
        bench.compile(candidate, Workload.from_json(workload))
        bench.verify(candidate)
        benches.append(bench)
    by_operating_point = zip(*(bench.programs for bench in benches), strict=True)
    samples = []
    for programs in by_operating_point:
        sides = timing.side_by_side(steps(programs, cold_bytes), rounds, canary=work.canary, seconds=seconds).sides
        samples.append([_each_step(side, compiled) for side, compiled in zip(sides, programs, strict=True)])
    return {"samples_s": samples}


def write_artifact(
    work: Workbench,
    progress: Progress,
    point: Mapping[str, Any],
    workload: Mapping[str, Any],
    recipe: Mapping[str, Any],
    corpus: str,
    cache: str,
    manifest: Mapping[str, Any],
    folder: str,
    absent: str | None = None,
) -> dict[str, Any]:
    """Compile the candidate with its trained weights, verify that, and save all of it to `folder`."""
    candidate, quality = Candidate.from_point(point), Recipe.from_json(recipe)
    weights = served(candidate, quality, work.corpus(corpus), Path(cache), progress)
    chip = None if absent is None else accelerator(absent)
    save_artifact(candidate, Workload.from_json(workload), weights, manifest, Path(folder), chip)
    return {}


def _compiler(absent: str | None) -> Compile:
    return for_default_device if absent is None else accelerator(absent).compile


def _memory(made: Sequence[tuple[Program, jax.stages.Compiled]]) -> dict[str, Any]:
    """The bytes of a candidate's weights and of its largest cache, as they are stored, and those that its largest
    program takes in memory."""
    return {
        "weight_bytes": sum(spec.size * spec.dtype.itemsize for spec in made[0][0].params.values()),
        "cache_bytes": max(sum(spec.size * spec.dtype.itemsize for spec in program.cache) for program, _ in made),
        "memory_bytes": max(memory_bytes(executable) for _, executable in made),
    }


def _each_step(samples: list[float], compiled: Compiled) -> list[float]:
    return [seconds / compiled.program.steps for seconds in samples]


def _at_hand(work: Workbench, point: Mapping[str, Any]) -> Candidate:
    candidate = Candidate.from_point(point)
    if work.bench.uid != candidate.uid:
        raise Rejected(f"candidate {candidate.uid} is not compiled in this worker")
    return candidate


TASKS: dict[str, Task] = {
    "device": tell_device,
    "peaks": measure_peaks,
    "options": check_options,
    "compile": compile_candidate,
    "compile_for_absent": compile_for_absent,
    "features": tell_features,
    "verify": verify_candidate,
    "verify_portable": verify_portable,
    "measure": measure_candidate,
    "operation": time_operation,
    "energy_counter": tell_energy_counter,
    "energy": count_energy,
    "quality": evaluate_quality,
    "compare": compare_candidates,
    "artifact": write_artifact,
}
