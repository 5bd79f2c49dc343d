"""Write a candidate with its trained weights as an artifact."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from jax.experimental.layout import Format, Layout
from safetensors.numpy import save

from cosearch import axes
from cosearch.architecture.decoder import Decoder, Params, plain_decoder
from cosearch.artifact import DTYPES, MANIFEST, VERIFICATION, VERSION, WEIGHTS
from cosearch.core.candidate import Candidate
from cosearch.core.errors import Rejected
from cosearch.core.files import new_folder, write_json
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.measure.bench import Compiled
from cosearch.measure.fingerprint import fingerprint
from cosearch.measure.verify import Reference
from cosearch.precision import Precision
from cosearch.quality.serve import Served
from cosearch.schedule import Schedule
from cosearch.schedule.program import Compile, Program, for_default_device
from cosearch.targets.accelerator import Accelerator

PREFILL_CHUNK = 64
"""Prompt tokens that one call of the prefill program takes."""

_VERIFIED_POSITIONS = 128
_SEED = 21


def save_artifact(
    candidate: Candidate,
    workload: Workload,
    weights: Served,
    manifest: Mapping[str, Any],
    folder: Path,
    absent: Accelerator | None = None,
) -> None:
    """Compile, verify and write; `folder` is there whole or not at all.

    The executables are for the `absent` chip, if one is given; what is verified then, here, are the portable programs.

    Raises:
        Rejected: the file of weights cannot hold a parameter's dtype, or a program does not compile, or it computes
            wrong results with these weights.
    """
    model = axes.decoder(candidate)
    params = weights.params(model)
    for path, array in params.items():
        if array.dtype not in map(np.dtype, DTYPES.values()):
            raise Rejected(f"{path} is of {array.dtype}, which {WEIGHTS} cannot hold")
    capacity = workload.context
    chunk = min(PREFILL_CHUNK, capacity)
    programs = {
        "decode": Program(model, "decode", workload.batch, capacity, steps=min(model.schedule.steps, capacity)),
        "prefill": Program(model, "prefill", workload.batch, capacity, chunk),
    }
    portable = {phase: replace(one, model=axes.portable_decoder(candidate)) for phase, one in programs.items()}
    options = Schedule.of(candidate.schedule).options
    compiled = _compile_both(programs, options, for_default_device if absent is None else absent.compile)
    formats = programs["decode"].formats(compiled["decode"])
    if absent is None:
        verification = _verify(candidate, weights, model, params, programs, compiled, options)
    else:
        here = _compile_both(portable, {}, for_default_device)
        verification = _verify(candidate, weights, model, params, portable, here, {})
        verification["of"] = f"the portable programs, on this machine: the executables never ran on {absent.name}"

    with new_folder(folder) as draft:
        # "pt" is what Hugging Face tools look for; the arrays are numpy's.
        stored = save({path: np.ascontiguousarray(array) for path, array in params.items()}, {"format": "pt"})
        (draft / WEIGHTS).write_bytes(stored)  # not by `save_file`, whose error does not say that the disk is full
        for phase in programs:
            (draft / f"{phase}.executable").write_bytes(_runtime_bytes(compiled[phase]))
            (draft / f"{phase}.stablehlo").write_bytes(_export(portable[phase], absent).serialize())
        write_json(draft / VERIFICATION, verification)
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(draft.iterdir())}
        program = programs["decode"]
        write_json(
            draft / MANIFEST,
            {
                "version": VERSION,
                "uid": candidate.uid,
                "candidate": candidate.point,
                **manifest,
                "fingerprint": fingerprint(),
                "platform": jax.devices()[0].platform if absent is None else absent.platform,
                "ran_there": absent is None,
                "compiler_options": options,
                "kernels": sorted({name for program in programs.values() for name in program.kernels()}),
                "batch": workload.batch,
                "capacity": capacity,
                "prefill_chunk": chunk,
                "steps": programs["decode"].steps,
                "params": list(program.params),
                "cache": [{"shape": list(spec.shape), "dtype": str(spec.dtype)} for spec in program.cache],
                "layouts": list(map(_layout, formats)),
                "sha256": files,
            },
        )


def _compile_both(
    programs: Mapping[str, Program], options: Mapping[str, Any], compiler: Compile
) -> dict[str, jax.stages.Compiled]:
    decode = programs["decode"].compile(options, (), compiler)
    return {
        "decode": decode,
        "prefill": programs["prefill"].compile(options, programs["decode"].formats(decode), compiler),
    }


def _export(program: Program, absent: Accelerator | None) -> export.Exported:
    """For the device at hand, and for an absent chip as well, which then multiplies as it was compiled to."""
    if absent is None:
        return export.export(program.jitted())(*program.arguments())
    with absent.exact():
        platforms = (jax.devices()[0].platform, absent.lowered_for)
        return export.export(program.jitted(), platforms=platforms)(*program.arguments())


def _layout(form: Format | None) -> list[Any] | None:
    """A layout for the manifest: the axes from major to minor, and the tiles that they are cut into."""
    if form is None or not isinstance(form.layout, Layout):
        return None
    return [form.layout.major_to_minor, form.layout.tiling or ()]


def _runtime_bytes(compiled: jax.stages.Compiled) -> bytes:
    """The runtime's own serialized form (`load.py` says why not JAX's)."""
    executable = compiled.runtime_executable()
    if executable is None:
        raise Rejected("this backend cannot serialize its executables")
    return executable.serialize()


def _verify(
    candidate: Candidate,
    weights: Served,
    model: Decoder,
    params: Params,
    programs: Mapping[str, Program],
    compiled: Mapping[str, jax.stages.Compiled],
    options: dict[str, Any],
) -> dict[str, Any]:
    plain = plain_decoder(model.shape, Precision.of(candidate.precision))
    decode = programs["decode"]
    positions = min(_VERIFIED_POSITIONS, decode.capacity)
    tokens = np.random.default_rng(_SEED).integers(0, 256, (decode.batch, positions)).astype(np.int32)
    reference = Reference(plain, weights.params(plain), tokens)
    formats = decode.formats(compiled["decode"])
    arrays = [jax.device_put(params[path], one) for path, one in zip(decode.params, formats, strict=False)]
    one_step = replace(decode, steps=1).compile(options, formats) if decode.steps > 1 else compiled["decode"]
    results = {}
    for phase, program in programs.items():
        point = OperatingPoint(program.phase, program.batch, program.capacity)
        bench = Compiled(point, program, compiled[phase], arrays, one_step)
        results[phase] = asdict(reference.compare(bench.logits(tokens, _SEED)))
    return {"of": "the executables", "against": "float64, teacher forcing", "seed": _SEED, "results": results}
