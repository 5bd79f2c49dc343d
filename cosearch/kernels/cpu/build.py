"""Compiling the C++ kernels where they run: by the local compiler, at first use, kept by their content.

A kernel is one of the files in `native/` with macros; its library is named by the hash of all that went into it (the
sources, the macros, the compiler and the processor's instructions), so nothing stale is ever loaded.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version as version_of
from pathlib import Path

import jax

from cosearch.core.errors import Rejected
from cosearch.paths import cache_dir

_SOURCES = Path(__file__).parent / "native"
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-w")
_LIMIT_S, _VERSION_S = 120.0, 10.0
_DRAFT = "draft-"

INSTRUCTIONS: Mapping[str, tuple[str, ...]] = {
    "avx2": ("avx2", "fma", "f16c", "bmi2"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "vnni": ("avx512_vnni",),
    "bf16": ("avx512_bf16",),
}
"""Sets of instructions to the processor's flags, as Linux names them. Each set needs those before it."""


def processor() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def compiler() -> tuple[str, ...]:
    """The command of a C++ compiler; nothing where there is none. The environment variable CXX has another."""
    try:
        commands = [shlex.split(os.environ["CXX"])] if "CXX" in os.environ else [["g++"], ["clang++"]]
    except ValueError:  # a quotation that does not end
        return ()
    for command in commands:
        if command and (path := shutil.which(command[0])):
            return (path, *command[1:])
    return ()


@functools.cache
def instructions() -> tuple[str, ...]:
    """The sets of instructions that this processor has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    has = set(line.partition(":")[2].split())
    return tuple(name for name, needed in INSTRUCTIONS.items() if has.issuperset(needed))


@functools.cache
def why_unavailable() -> str | None:
    """Why no kernel can be compiled and run here; None where they can: the smallest one was compiled."""
    if why := _what_lacks():
        return why
    try:
        _load("read.cc", (), instructions())
    except Rejected as rejection:
        return str(rejection)
    return None


def _what_lacks() -> str | None:
    if "avx2" not in instructions():
        return "the processor has no AVX2"
    if not compiler():
        return "there is no C++ compiler (g++ or clang++, or the one that CXX names)"
    return None


def load(source: str, macros: Mapping[str, str | int], isa: tuple[str, ...]) -> ctypes.CDLL:
    """The library of `native/<source>`, compiled with `macros` for the instructions `isa` if it is not in the cache.

    Raises:
        Rejected: it cannot be compiled here, or not be kept, or the compiler refuses it.
    """
    if why := _what_lacks():
        raise Rejected(f"a native kernel cannot be compiled: {why}")
    if missing := [name for name in isa if name not in instructions()]:
        # A library in the cache would load and then be killed for its first instruction.
        raise Rejected(f"a native kernel is made for {', '.join(missing)}, which this processor does not have")
    return _load(source, tuple(sorted(macros.items())), isa)


@functools.cache
def _load(source: str, macros: tuple[tuple[str, str | int], ...], isa: tuple[str, ...]) -> ctypes.CDLL:
    defined = [f"-D{name}={value}" for name, value in macros]
    command = [*_FLAGS, *_targets(isa), *defined, f"-I{jax.ffi.include_dir()}"]
    digest = hashlib.sha256(repr((source, state(), [*_FLAGS, *_targets(isa), *defined], version())).encode())
    digest.update(version_of("jaxlib").encode() if source == "runtime.cc" else b"")
    library = cache_dir() / "kernels" / f"{Path(source).stem}-{digest.hexdigest()[:16]}.so"
    try:
        if not library.is_file():
            library.parent.mkdir(parents=True, exist_ok=True)
            _remove_left_overs(library.parent)
            # Compiled beside its place and moved there: another process may be at the same.
            with tempfile.TemporaryDirectory(dir=library.parent, prefix=_DRAFT) as folder:
                made = Path(folder) / library.name
                _compile([*command, str(_SOURCES / source), "-o", str(made)])
                made.rename(library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise Rejected(f"a native kernel cannot be kept in {library.parent}: {error}") from None


def _remove_left_overs(folder: Path) -> None:
    """The folders of compilations that were killed."""
    for draft in folder.glob(f"{_DRAFT}*"):
        with contextlib.suppress(FileNotFoundError):  # another process has just made its library of it
            if draft.stat().st_mtime < time.time() - 10 * _LIMIT_S:
                shutil.rmtree(draft, ignore_errors=True)


def _compile(arguments: list[str]) -> None:
    path = shlex.join(compiler())
    try:
        done = subprocess.run([*compiler(), *arguments], capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise Rejected(f"{path} did not compile a native kernel in {_LIMIT_S:g} s") from None
    if done.returncode:
        raise Rejected(f"{path} does not compile a native kernel: {done.stderr.strip().splitlines()[:3]}")


def _targets(isa: tuple[str, ...]) -> list[str]:
    """The compiler's options for sets of instructions."""
    flags = [flag for name in isa for flag in INSTRUCTIONS[name]]
    return [f"-m{flag.replace('avx512_', 'avx512')}" for flag in flags] + ["-mprefer-vector-width=512"]


@functools.cache
def state() -> str:
    """The hash of all sources: they include each other."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def version() -> str:
    """The compiler's name and version; nothing where there is none, or none that says so."""
    if not compiler():
        return ""
    command = [*compiler(), "--version"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_VERSION_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout.partition("\n")[0]


def threads() -> int:
    """How many threads XLA has: one for each processor that this process may use."""
    return len(os.sched_getaffinity(0))
