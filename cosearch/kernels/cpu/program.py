"""Native programs: several operations of `native/` in one call out of an XLA executable.

XLA's threads run a program together (`native/runtime.cc`), operation by operation, so that from one to the next there
is a barrier of less than a microsecond and not a call, and what one leaves for another stays in the cache.
"""

import ctypes
import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosearch.core.errors import Rejected
from cosearch.kernels.cpu import build

TARGET = "cosearch_run"
"""The name under which XLA calls native programs."""

_KERNELS = "cosearch_kernels"
"""The attribute of a call that names its kernels."""

_NAME = re.compile(r"(\w+):((?:\w+=\w+(?:,\w+=\w+)*)?):((?:\w+(?:\+\w+)*)?):(\w+)", re.ASCII)
"""What `Kernel.name` gives: it comes back from files."""

_ALIGNED = 64


@dataclass(frozen=True)
class Kernel:
    """An operation: a file of `native/` without ".cc", the macros it is compiled with, for which instructions, and
    which state of the sources: programs of another one may call it with other buffers and parameters."""

    source: str
    macros: tuple[tuple[str, str | int], ...] = ()
    isa: tuple[str, ...] = field(default_factory=build.instructions)
    state: str = field(default_factory=build.state)

    @property
    def name(self) -> str:
        """All of it as text, from which `of_name` makes it again."""
        macros = ",".join(f"{name}={value}" for name, value in self.macros)
        return f"{self.source}:{macros}:{'+'.join(self.isa)}:{self.state}"

    @classmethod
    def of_name(cls, name: str) -> "Kernel":
        """The kernel of a name.

        Raises:
            Rejected: it names none.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise Rejected(f"{name!r} names no native kernel")
        source, macros, isa, state = found.groups()
        pairs = (macro.split("=") for macro in filter(None, macros.split(",")))
        values = tuple((key, int(value) if value.isdigit() else value) for key, value in pairs)
        return cls(source, values, tuple(filter(None, isa.split("+"))), state)

    @property
    def number(self) -> int:
        """Names it in programs, in 63 bits."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "little") >> 1


def kernels_in(text: str) -> list[str]:
    """The names of the kernels that programs in a lowered module's text call: what a process must `load` to run it."""
    lists = re.findall(rf'{_KERNELS} = "([^"]*)"', text)
    return sorted({name for names in lists for name in names.split(";") if name})


@functools.cache
def load(kernel: Kernel) -> None:
    """Make a kernel known to the programs of this process.

    Raises:
        Rejected: it cannot be compiled here, or its sources are other ones now.
    """
    if kernel.state != build.state():
        raise Rejected(f"the native kernel {kernel.source!r} was made from other sources than are here")
    library = build.load(f"{kernel.source}.cc", dict(kernel.macros), kernel.isa)
    address = [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in ("chunks", "run")]
    _runtime().CosearchRegister(ctypes.c_int64(kernel.number), *address)


@functools.cache
def _runtime() -> ctypes.CDLL:
    library = build.load("runtime.cc", {}, ("avx2",))
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.CosearchRun), platform="cpu")
    return library


@dataclass(frozen=True)
class Buffer:
    """Memory of a program: an argument or a result by its place, or an offset in the arena."""

    kind: str
    at: int


@dataclass
class Program:
    """Collects operations over buffers; `call` runs them. All numbers in temporaries are float32 unless said."""

    _arguments: list[jax.Array] = field(default_factory=list)
    _results: list[jax.ShapeDtypeStruct] = field(default_factory=list)
    _aliases: dict[int, int] = field(default_factory=dict)
    _used: int = 0
    _arena: int = 0
    _operations: list[tuple[Kernel, Sequence[Buffer], Sequence[int]]] = field(default_factory=list)

    def argument(self, array: jax.Array) -> Buffer:
        """What the program reads."""
        for place, known in enumerate(self._arguments):
            if known is array:
                return Buffer("argument", place)
        self._arguments.append(array)
        return Buffer("argument", len(self._arguments) - 1)

    def result(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Buffer:
        """What the program gives back, in the order of these calls."""
        self._results.append(jax.ShapeDtypeStruct(shape, dtype))
        return Buffer("result", len(self._results) - 1)

    def updated(self, array: jax.Array) -> Buffer:
        """A result that begins as `array`, which it takes the place of: in its memory, if nothing else reads that."""
        buffer = self.result(array.shape, array.dtype)
        self._aliases[self.argument(array).at] = buffer.at
        return buffer

    def temporary(self, size_bytes: int) -> Buffer:
        """Memory between operations."""
        at = self._used
        self._used += -(-size_bytes // _ALIGNED) * _ALIGNED
        self._arena = max(self._arena, self._used)
        return Buffer("arena", at)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Temporaries made inside are free again after it."""
        used = self._used
        yield
        self._used = used

    def add(self, kernel: Kernel, buffers: Sequence[Buffer], params: Sequence[int]) -> None:
        """The next operation.

        Raises:
            Rejected: its kernel cannot be compiled.
        """
        load(kernel)
        self._operations.append((kernel, buffers, params))

    def call(self) -> list[jax.Array]:
        """Run it: the results."""
        count = len(self._arguments)
        place = {"argument": 0, "result": count}
        encoded: list[int] = []
        for kernel, buffers, params in self._operations:
            encoded += [kernel.number, len(buffers), len(params)]
            encoded += [-1 - one.at if one.kind == "arena" else place[one.kind] + one.at for one in buffers]
            encoded += params
        arena = jax.ShapeDtypeStruct((max(self._arena, _ALIGNED),), jnp.uint8)
        run = jax.ffi.ffi_call(TARGET, [*self._results, arena], input_output_aliases=self._aliases)
        names = ";".join(sorted({kernel.name for kernel, *_ in self._operations}))
        return list(run(*self._arguments, program=np.array(encoded, np.int64), **{_KERNELS: names}))[:-1]
