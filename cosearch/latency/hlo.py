"""What the compiler made of a program: the kernels of its optimised HLO, and the bytes each moves.

Read from the text, which is the same language for CPUs, GPUs and TPUs. A kernel is what the device starts as one: a
fusion, a call of a library, or an operation that was left alone. Loops count as often as they run. Bytes are those of
main memory: on TPUs the compiler says what it keeps on the chip.

To tell a model of something new, add it to `HloFeatures`, and to `Kernel` what is of each.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

_NAME = r"%?[\w.\-]+"
_COMPUTATION = re.compile(rf"^(ENTRY )?({_NAME}) \(.*-> .*\{{$")
_INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?({_NAME}) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_OPERAND = re.compile(r"%[\w.\-]+")
_CALLED = re.compile(rf"(?:calls|to_apply|body|condition)=({_NAME})")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(rf"condition=({_NAME})")
_WHOLE = re.compile(r"\[\]\S* constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_PARAMETER = re.compile(r" parameter\((\d+)\)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_TILE = re.compile(r"\(([\d,]+)\)")

_DTYPES = {"pred": "bool", "bf16": "bfloat16"}
"""HLO's names of dtypes where they are not a letter and the bits."""
_KINDS = {"f": "float", "s": "int", "u": "uint", "c": "complex"}

_FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
        *("opt-barrier", "add-dependency", "domain", "async-update"),
    }
)
"""What costs nothing; nor does what ends in `-done`, which has been counted where it began."""
_NO_CALLS = frozenset({"AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding", "ConcatBitcast"})
"""What is called, and runs nothing."""
_CALLS = frozenset({"while", "conditional", "call", "async-start"})
_COPIES = frozenset({"copy", "copy-start", "transpose"})
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
_SMALL_BYTES = 512
"""What moves less, and is no fusion or call, is done by the scalar unit or in passing."""


@dataclass(frozen=True)
class Shape:
    """An array in HLO: dtype, sizes, and the bytes that it takes in `space`, 0 for main memory, with its padding."""

    dtype: str
    sizes: tuple[int, ...]
    bytes: int
    space: int

    @property
    def plain_bytes(self) -> int:
        """Without padding."""
        return math.ceil(math.prod(self.sizes) * _bits(self.dtype) / 8)


@dataclass(frozen=True)
class Instruction:
    """A line of HLO."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @property
    def memory_bytes(self) -> int:
        """What it leaves in main memory."""
        return sum(shape.bytes for shape in self.shapes if not shape.space)


@dataclass(frozen=True)
class Kernel:
    """One kernel: how often it runs, the bytes that each run reads from main memory and writes to it, what it is called
    where it is a library's or written by hand, and the cycles that the compiler for TPUs expects of it."""

    opcode: str
    runs: float
    read_bytes: float
    written_bytes: float
    target: str = ""
    cycles: float = 0.0


@dataclass(frozen=True)
class HloFeatures:
    """One compiled program, in a few numbers: the kernels that a run starts (`launches`), those of them that the
    compiler fused, and those that a library or a kernel written by hand does (`custom_calls`); the bytes that all of
    them read and write; of these, what copies and transposes of whole arrays of the cache make (`copied_bytes`); what
    it needs beside its inputs and results (`temporary_bytes`); and the cycles that the compiler for TPUs expects of
    all, 0 of others: a feature, no result."""

    launches: float
    fusions: float
    custom_calls: float
    moved_bytes: float
    copied_bytes: float
    temporary_bytes: float
    estimated_cycles: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "HloFeatures":
        return cls(**data)

    @classmethod
    def of(cls, compiled: jax.stages.Compiled, cache: Collection[Any]) -> "HloFeatures":
        """Of a compiled program and the arrays of its cache."""
        module, analysis = Module(compiled.as_text() or ""), compiled.memory_analysis()
        kernels = tuple(module.kernels())
        return cls(
            launches=sum(one.runs for one in kernels),
            fusions=sum(one.runs for one in kernels if one.opcode == "fusion"),
            custom_calls=sum(one.runs for one in kernels if one.target),
            moved_bytes=sum(one.runs * (one.read_bytes + one.written_bytes) for one in kernels),
            copied_bytes=module.copied_bytes(cache),
            temporary_bytes=int(analysis.temp_size_in_bytes) if analysis is not None else 0,
            estimated_cycles=sum(one.runs * one.cycles for one in kernels),
        )


@dataclass(frozen=True)
class Copy:
    """A copy or transpose: what it makes, and how often."""

    shape: Shape
    runs: float


@dataclass(frozen=True)
class Module:
    """Optimised HLO."""

    text: str

    @property
    def computations(self) -> dict[str, dict[str, Instruction]]:
        """Instructions by name, by computation."""
        return self._parsed[1]

    @property
    def entry(self) -> str:
        """The computation that is run; "" where there is none."""
        return self._parsed[0]

    @cached_property
    def _parsed(self) -> tuple[str, dict[str, dict[str, Instruction]]]:
        entry, found = "", {}
        inside: dict[str, Instruction] | None = None
        for line in self.text.splitlines():
            if inside is None or not line.startswith(" "):
                if head := _COMPUTATION.match(line):
                    inside = found[head[2]] = {}
                    entry = head[2] if head[1] else entry
            elif part := _INSTRUCTION.match(line):
                name, shapes, opcode, rest = part.groups()
                operands, made = tuple(_OPERAND.findall(rest[: _closing(rest)])), tuple(_shapes(shapes))
                if opcode == "fusion-start":  # gives what it is given, its results, and a token
                    opcode, made = "fusion", made[len(operands) : -1]
                inside[name] = Instruction(name, opcode, made, operands, line, line.lstrip().startswith("ROOT "))
        return entry, found

    def kernels(self) -> Iterator[Kernel]:
        """Every kernel that a run starts."""
        for computation, runs in self._run(self.entry, 1.0):
            inside = self.computations[computation]
            for one in inside.values():
                kernel = self._kernel(one, inside, runs)
                if kernel is not None:
                    yield kernel

    def copies(self) -> Iterator[Copy]:
        """Every copy and transpose that a run makes in main memory, also those that end a fusion."""
        for computation, runs in self._run(self.entry, 1.0):
            for one in self.computations[computation].values():
                body = self._body(one)
                made = [one] if body is None else _results(body)
                for shape in (each.shapes[0] for each in made if each.opcode in _COPIES and each.shapes):
                    if not shape.space:
                        yield Copy(shape, runs)

    def copied_bytes(self, cache: Collection[Any]) -> float:
        """How much of the cache a run copies or transposes as whole arrays: nothing, where it is written in place."""
        whole = {(str(jnp.dtype(one.dtype)), tuple(sorted(one.shape))) for one in cache}
        return sum(
            copy.runs * copy.shape.plain_bytes
            for copy in self.copies()
            if (copy.shape.dtype, tuple(sorted(copy.shape.sizes))) in whole
        )

    def _run(self, name: str, runs: float) -> Iterator[tuple[str, float]]:
        """The computations that are run from `name` on, without those of fusions, and how often."""
        if name not in self.computations:
            return
        yield name, runs
        for one in self.computations[name].values():
            called, times = _CALLED.findall(one.text), runs
            if one.opcode == "while":
                times = runs * self._trips(one)
            elif one.opcode == "conditional":
                called = [name for both in _BRANCHES.findall(one.text) for name in _OPERAND.findall(" ".join(both))]
                times = runs / max(len(called), 1)  # one branch is taken; which is not known
            elif one.opcode not in _CALLS:
                continue
            for each in called:
                yield from self._run(each, times)

    def _trips(self, loop: Instruction) -> float:
        """How often a loop runs: what the compiler says, or, as that for TPUs does not, below which number its counter
        stays, which starts from 0 as those of `jax.lax.scan` do; 1 where neither is known."""
        if told := _TRIPS.search(loop.text):
            return float(told[1])
        condition = _CONDITION.search(loop.text)
        inside = self.computations.get(condition[1], {}).values() if condition else ()
        bounds = [float(found[1]) for one in inside if (found := _WHOLE.search(one.text)) and one.opcode == "constant"]
        return bounds[0] if len(bounds) == 1 else 1.0

    def _kernel(self, one: Instruction, inside: Mapping[str, Instruction], runs: float) -> Kernel | None:
        if one.opcode in _FREE or one.opcode in _CALLS or one.opcode.endswith("-done"):
            return None
        found = _TARGET.search(one.text)
        target = found[1] if found else ""
        if target in _NO_CALLS:
            return None
        body = self._body(one)
        operands = [inside[name] for name in one.operands if name in inside]
        if body is not None:
            read, written = self._fused_bytes(one, operands, body)
        elif one.opcode in _SLICES:
            read = written = one.memory_bytes
        elif one.opcode == "dynamic-update-slice":
            read = written = operands[1].memory_bytes if len(operands) > 1 else 0
        elif one.opcode == "copy-start":  # gives the copy, what is copied, and a token
            read = one.shapes[1].bytes if not one.shapes[1].space else 0
            written = one.shapes[0].bytes if not one.shapes[0].space else 0
        else:
            read, written = sum(each.memory_bytes for each in operands), one.memory_bytes
            if target.startswith("__cublas"):  # gives its workspace, too
                written = one.shapes[0].bytes
        if one.opcode != "fusion" and not target and read + written < _SMALL_BYTES:
            return None
        cycles = _CYCLES.search(one.text)
        return Kernel(one.opcode, runs, float(read), float(written), target, float(cycles[1]) if cycles else 0.0)

    def _fused_bytes(
        self, one: Instruction, operands: Sequence[Instruction], body: Mapping[str, Instruction]
    ) -> tuple[float, float]:
        """What a fusion reads and writes: of an operand of which it takes slices, those alone; of one that it writes
        into, what it writes."""
        read = 0.0
        for name, index in _parameters(body).items():
            if index < len(operands) and (whole := operands[index].memory_bytes):
                read += self._read(name, body, whole)
        written = float(one.memory_bytes)
        for each in _results(body):
            if each.opcode == "dynamic-update-slice" and each.operands[1] in body:
                part = sum(shape.bytes for shape in body[each.operands[1]].shapes)
                written -= max(min(each.shapes[0].bytes, written) - part, 0)
        return read, written

    def _read(self, name: str, body: Mapping[str, Instruction], whole: float) -> float:
        """How much of a value of `whole` bytes a fused computation reads."""
        parts = 0.0
        for user in (each for each in body.values() if name in each.operands):
            inner = self._body(user)
            if user.opcode in _SLICES and user.operands[0] == name:
                parts += sum(shape.bytes for shape in user.shapes)
            elif user.opcode == "bitcast":
                parts += self._read(user.name, body, whole)
            elif inner is not None:
                at = {index: parameter for parameter, index in _parameters(inner).items()}
                taken = [at[index] for index, operand in enumerate(user.operands) if operand == name and index in at]
                parts += sum(self._read(parameter, inner, whole) for parameter in taken)
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
                return whole
        return min(parts, whole)

    def _body(self, one: Instruction) -> dict[str, Instruction] | None:
        called = _CALLED.search(one.text) if one.opcode == "fusion" else None
        return self.computations.get(called[1]) if called else None


def _parameters(body: Mapping[str, Instruction]) -> dict[str, int]:
    """The parameters of a computation, and which each is."""
    found = {each.name: _PARAMETER.search(each.text) for each in body.values() if each.opcode == "parameter"}
    return {name: int(number[1]) for name, number in found.items() if number}


def _results(body: Mapping[str, Instruction]) -> list[Instruction]:
    """The instructions of a fused computation whose values are its results."""
    found = [each for each in body.values() if each.is_root]
    while any(each.opcode in ("tuple", "bitcast") for each in found):
        found = [
            inner
            for each in found
            for inner in (
                [body[name] for name in each.operands if name in body]
                if each.opcode in ("tuple", "bitcast")
                else [each]
            )
        ]
    return found


def _closing(text: str) -> int:
    """Where the bracket that was opened before `text` is closed."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return index
    return len(text)


def _shapes(text: str) -> Iterator[Shape]:
    for kind, sizes, layout in _SHAPE.findall(text):
        dtype = _dtype(kind)
        if dtype is None:
            continue
        shape = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        tile = _TILE.search(layout.partition("T")[2]) if "T(" in layout else None
        elements = math.prod(_padded(shape, layout, tuple(map(int, tile[1].split(",")))) if tile else shape)
        yield Shape(dtype, shape, math.ceil(elements * _bits(dtype) / 8), int(space[1]) if space else 0)


def _padded(sizes: tuple[int, ...], layout: str, tile: tuple[int, ...]) -> list[int]:
    """The sizes of an array whose most minor axes are filled up to whole tiles."""
    order = [int(axis) for axis in layout.partition(":")[0].split(",") if axis]
    padded = list(sizes)
    for axis, size in zip(order, reversed(tile), strict=False):
        padded[axis] = -(-padded[axis] // size) * size
    return padded


def _dtype(kind: str) -> str | None:
    """JAX's name of a dtype of HLO's; None for what is no array."""
    if kind in _DTYPES:
        return _DTYPES[kind]
    found = re.fullmatch(r"([fsuc])(\d+)(e\w+)?", kind)
    if not found:
        return None
    tail = f"_{found[3]}" if found[3] else ""
    return f"{_KINDS[found[1]]}{found[2]}{tail}"


def _bits(dtype: str) -> int:
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8
