"""Load an artifact in any process: its files are checked, its programs made ready, nothing else is needed."""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding
from safetensors import deserialize

from cosearch.artifact import DTYPES, MANIFEST, VERSION, WEIGHTS
from cosearch.core.errors import Rejected, UserError
from cosearch.kernels.cpu.program import Kernel
from cosearch.kernels.cpu.program import load as load_kernel
from cosearch.measure.fingerprint import fingerprint

_MUST_AGREE = ("jaxlib", "processor", "system")
"""What a serialized executable was made for; elsewhere it is compiled again."""

_KINDS = {
    "sha256": dict,
    "fingerprint": dict,
    "platform": str,
    "params": list,
    "cache": list,
    "layouts": list,
    "kernels": list,
    "batch": int,
    "capacity": int,
    "prefill_chunk": int,
    "steps": int,
}
"""What loading and generating reads of a manifest."""
_FILES = {WEIGHTS} | {f"{phase}.{kind}" for phase in ("prefill", "decode") for kind in ("executable", "stablehlo")}

Run = Callable[..., tuple[jax.Array, ...]]


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact; `run[phase]` takes the parameters, the cache, tokens and positions, flat.

    `recompiled` says why the executables were not used, or is None where they were.
    """

    folder: Path
    manifest: dict[str, Any]
    params: list[jax.Array]
    run: dict[str, Run]
    recompiled: str | None

    def empty_cache(self) -> list[jax.Array]:
        cache = [jnp.zeros(entry["shape"], entry["dtype"]) for entry in self.manifest["cache"]]
        return _placed(self.folder, cache, [] if self.recompiled else self.manifest["layouts"][len(self.params) :])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with every file it names checked against its hash.

    Raises:
        UserError: this is no artifact, it is of another version, or a file is missing or changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"artifact={folder}: {MANIFEST}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"artifact={folder}: {MANIFEST} is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise UserError(f"artifact={folder}: {MANIFEST} is not of version {VERSION}, which this cosearch reads")
    for key, kind in _KINDS.items():
        value: Any = manifest.get(key)
        if not isinstance(value, kind) or (kind is int and value < 1):
            raise UserError(f"artifact={folder}: {MANIFEST}: {key!r} is missing or wrong")
    if missing := sorted(_FILES - manifest["sha256"].keys()):
        raise UserError(f"artifact={folder}: {MANIFEST}: 'sha256' has no {missing[0]}")
    for name, digest in manifest["sha256"].items():
        if Path(name).name != name or name in ("", ".."):
            raise UserError(f"artifact={folder}: {MANIFEST} names a file outside the folder: {name!r}")
        try:
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"artifact={folder}: {name}: {error.strerror}") from None
        if found != digest:
            raise UserError(f"artifact={folder}: {name} is not the file that was saved (its SHA-256 differs)")
    return manifest


def load(folder: Path) -> Artifact:
    """Check and load an artifact; on another jaxlib or chip, compile it again from its StableHLO.

    Raises:
        UserError: this is no intact artifact, or it cannot be compiled here.
    """
    manifest = read_manifest(folder)
    stored = _read_weights(folder)
    if missing := [path for path in manifest["params"] if path not in stored]:
        raise UserError(f"artifact={folder}: {MANIFEST}: 'params' names {missing[0]!r}, which {WEIGHTS} has not")
    if len(manifest["layouts"]) != len(manifest["params"]) + len(manifest["cache"]):
        raise UserError(f"artifact={folder}: {MANIFEST}: 'layouts' are not those of its parameters and cache")
    made, here = manifest["fingerprint"], fingerprint()
    differing = [
        f"{name} {made.get(name)} there, {here[name]} here" for name in _MUST_AGREE if made.get(name) != here[name]
    ]
    platform = jax.devices()[0].platform
    if platform != manifest["platform"]:
        differing.append(f"platform {manifest['platform']} there, {platform} here")
    try:
        for name in manifest["kernels"]:
            load_kernel(Kernel.of_name(str(name)))
    except Rejected as rejection:
        differing.append(str(rejection))
    prepare = _compile if differing else _deserialize
    run = {phase: prepare(folder, phase, manifest) for phase in ("prefill", "decode")}
    arrays = [stored[path] for path in manifest["params"]]
    params = _placed(folder, arrays, [] if differing else manifest["layouts"][: len(arrays)])
    return Artifact(folder, manifest, params, run, "; ".join(differing) or None)


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    # `safetensors.numpy` 0.8 saves float8 and cannot load it.
    weights = {}
    for path, part in deserialize((folder / WEIGHTS).read_bytes()):
        if part["dtype"] not in DTYPES:
            raise UserError(f"artifact={folder}: {WEIGHTS}: {path!r} is of {part['dtype']}, not of {', '.join(DTYPES)}")
        weights[path] = np.frombuffer(part["data"], DTYPES[part["dtype"]]).reshape(part["shape"])
    return weights


def _placed(folder: Path, arrays: Sequence[Any], layouts: Sequence[Any]) -> list[jax.Array]:
    """The arrays on the device, in the layouts that executables were made for; the default where there is none."""
    here = SingleDeviceSharding(jax.devices()[0])
    try:
        formats = [one and Format(Layout(tuple(one[0]), tuple(map(tuple, one[1]))), here) for one in layouts]
        return [jax.device_put(*one) for one in itertools.zip_longest(arrays, formats)]
    except (TypeError, ValueError, LookupError, jax.errors.JaxRuntimeError) as error:
        raise UserError(f"artifact={folder}: {MANIFEST}: 'layouts' are none of this device: {error}") from None


def _deserialize(folder: Path, phase: str, manifest: dict[str, Any]) -> Run:
    # The runtime's own bytes, not `jax.experimental.serialize_executable`, which wraps them in a pickle.
    device = jax.devices()[0]
    executable = device.client.deserialize_executable((folder / f"{phase}.executable").read_bytes(), [device], None)

    def run(*arguments: Any) -> tuple[jax.Array, ...]:
        return tuple(out[0] for out in executable.execute_sharded(arguments).disassemble_into_single_device_arrays())

    return run


def _compile(folder: Path, phase: str, manifest: dict[str, Any]) -> Run:
    exported = export.deserialize(bytearray((folder / f"{phase}.stablehlo").read_bytes()))
    first = len(manifest["params"])
    donated = tuple(range(first, first + len(manifest["cache"])))
    jitted = jax.jit(exported.call, donate_argnums=donated, keep_unused=True)
    try:
        lowered = jitted.lower(*exported.in_avals)
        try:
            return lowered.compile(compiler_options=manifest["compiler_options"] or None)
        except (jax.errors.JaxRuntimeError, ValueError):
            return lowered.compile()  # another compiler need not know the options
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(f"artifact={folder}: {phase}.stablehlo does not compile here: {error}") from None
