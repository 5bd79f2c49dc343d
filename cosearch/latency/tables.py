"""Measured latencies of operations on GPUs, as tables: read, and described as numbers that mean the same on every chip.

A folder of tables has `systems.csv`, the specification of each system, and for each kind of operation files
`<kind>_<framework>.parquet`, as NVIDIA's aiconfigurator publishes them (github.com/ai-dynamo/aiconfigurator,
Apache-2.0). To add a kind of operation, register its columns and how they are described in `KINDS`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from packaging.version import InvalidVersion, Version

from cosearch.core.errors import UserError
from cosearch.core.registry import did_you_mean

SYSTEMS = "systems.csv"


@dataclass(frozen=True)
class _Generation:
    """The name of a generation of GPUs, and what its multiprocessors have: operations on bfloat16 by its tensor cores
    each cycle, a typical boost clock, and bytes of L2 cache for each."""

    name: str
    flops_per_cycle: float
    clock_hz: float
    l2_bytes: float


_MIB = 2.0**20
_GENERATIONS = {
    8.0: _Generation("Ampere", 2048, 1.41e9, 40 * _MIB / 108),
    8.6: _Generation("GeForce Ampere", 1024, 1.70e9, 6 * _MIB / 84),
    8.9: _Generation("Ada", 1024, 2.52e9, 96 * _MIB / 142),
    9.0: _Generation("Hopper", 4096, 1.83e9, 50 * _MIB / 132),
    10.0: _Generation("Blackwell", 8192, 1.86e9, 126 * _MIB / 148),
    10.3: _Generation("Blackwell", 8192, 1.86e9, 126 * _MIB / 148),
    12.0: _Generation("RTX Blackwell", 1024, 2.43e9, 128 * _MIB / 188),
}
"""NVIDIA's whitepapers of A100, GA102, Ada, H100, Blackwell and RTX Blackwell: what a specification sheet does not tell
follows from the compute capability that it does. Of newer ones the nearest is taken."""
_NO_CAPABILITY = replace(_GENERATIONS[8.9], name="of no compute capability")
"""Other makers' chips have none: multiprocessors of a middling size are assumed."""


@dataclass(frozen=True)
class GPUChip:
    """What latencies of operations depend on of a chip."""

    name: str
    bandwidth_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    """By dtype: "bfloat16", "fp8"."""
    multiprocessors: float
    clock_hz: float
    l2_bytes: float
    generation: str

    @classmethod
    def of_specification(
        cls, name: str, bandwidth_bytes_per_s: float, flops_per_s: Mapping[str, float], capability: float
    ) -> "GPUChip":
        """A chip of which a specification sheet tells bandwidth, peaks and compute capability (9.0; NaN where it has
        none).

        Raises:
            UserError: its generation is older than all that are known.
        """
        one = _NO_CAPABILITY
        if np.isfinite(capability):
            if capability < min(_GENERATIONS):
                raise UserError(f"{name}: compute capability {capability:g}; known are {min(_GENERATIONS)} and later")
            one = _GENERATIONS[min(_GENERATIONS, key=lambda known: abs(known - capability))]
        count = flops_per_s["bfloat16"] / one.flops_per_cycle / one.clock_hz
        return cls(name, bandwidth_bytes_per_s, flops_per_s, count, one.clock_hz, count * one.l2_bytes, one.name)

    @property
    def cycles_per_s(self) -> float:
        """Of all multiprocessors together."""
        return self.multiprocessors * self.clock_hz


@dataclass(frozen=True)
class Operations:
    """n operations of a kind, by the columns of `KINDS[kind]`, each [n]."""

    kind: str
    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: Any) -> "Operations":
        return Operations(self.kind, {name: values[rows] for name, values in self.columns.items()})


@dataclass(frozen=True)
class Description:
    """n operations on one chip: `features` [n, f], of which those from `relative` on depend on the chip; the roofline
    [n] in seconds with the overhead; `shares` [n, 3], which parts of that are overhead, memory and arithmetic;
    `kernels` [n, c], 1 for what software has kernels of its own for; and `octaves` [n, d], coordinates in which
    operations that are near cost alike."""

    features: np.ndarray
    relative: int
    roofline_s: np.ndarray
    shares: np.ndarray
    kernels: np.ndarray
    octaves: np.ndarray


@dataclass(frozen=True)
class Kind:
    """A kind of operation: which columns of its table are read, names of dtypes and `numbers`, to which `columns`, and
    how those are described."""

    dtypes: tuple[str, ...]
    numbers: tuple[str, ...]
    columns: tuple[str, ...]
    select: Callable[[Any], Any]
    """The rows of a table (pandas) that are of this kind, with a column for each of `columns`."""
    describe: Callable[[Mapping[str, np.ndarray], GPUChip], Description]


@dataclass(frozen=True)
class Measured:
    """Operations that were measured on one system by one version of a software, in seconds [n]."""

    chip: GPUChip
    version: str
    operations: Operations
    latency_s: np.ndarray


def _log2(values: np.ndarray) -> np.ndarray:
    return np.log2(np.maximum(values, 1e-30))


def _described(
    chip: GPUChip,
    raw: Sequence[np.ndarray],
    octaves: Sequence[np.ndarray],
    kernels: Sequence[np.ndarray],
    *,
    overhead_s: np.ndarray,
    kept_bytes: np.ndarray,
    moved_bytes: np.ndarray,
    arithmetic_s: np.ndarray,
    serial_s: np.ndarray,
    tiles: Sequence[np.ndarray],
) -> Description:
    """A description by ratios of times, of bytes to the L2 cache's, and of `tiles` to multiprocessors.

    `kept_bytes` are those that many tiles read, `serial_s` what one tile takes that none can share.
    """
    memory_s = moved_bytes / chip.bandwidth_bytes_per_s / _REACHED_BANDWIDTH
    busy_s = np.hypot(memory_s, arithmetic_s)
    roofline_s = overhead_s + busy_s
    l2_s = moved_bytes / (chip.cycles_per_s * _L2_BYTES_PER_CYCLE)
    waves = [one / chip.multiprocessors for one in tiles]
    relative = [
        _log2(memory_s / overhead_s),
        _log2(arithmetic_s / overhead_s),
        _log2(memory_s / arithmetic_s),
        np.log(roofline_s),
        _log2(kept_bytes / chip.l2_bytes),
        _log2(moved_bytes / chip.l2_bytes),
        _log2(l2_s / overhead_s),
        _log2(l2_s / memory_s),
        _log2(serial_s / overhead_s),
        *(_log2(one) for one in waves),
        *(one / np.ceil(one) for one in waves),
    ]
    overhead = overhead_s / roofline_s
    memory = (memory_s / busy_s) ** 2
    shares = np.stack([overhead, (1 - overhead) * memory, (1 - overhead) * (1 - memory)], axis=1)
    features = np.stack([*raw, *relative], axis=1)
    coordinates = np.stack([*octaves, *(_FAR * one for one in kernels), _log2(roofline_s)], axis=1)
    return Description(features, len(raw), roofline_s, shares, np.stack(kernels, axis=1), coordinates)


_FAR = 4.0
"""Octaves between operations that other kernels run."""
_REACHED_BANDWIDTH = 0.8
_L2_BYTES_PER_CYCLE = 32.0
"""Of a multiprocessor, roughly; the networks learn what is reached."""
_OVERHEAD_S = {"gemm": {"bfloat16": 2e-6, "fp8": 11e-6}, "attn_context": 12e-6, "attn_generation": 6e-6}
"""The roofline's, in seconds: a launch, and for fp8 the quantisation of the inputs; the networks learn what it is."""
_REACHED_FLOPS = {"gemm": {"bfloat16": 0.78, "fp8": 0.65}, "attn_context": 0.5, "attn_generation": 0.3}


def _by_dtype(values: Mapping[str, float], dtypes: np.ndarray) -> np.ndarray:
    found = np.full(len(dtypes), np.nan)
    for dtype in np.unique(dtypes):
        found[dtypes == dtype] = values.get(str(dtype), np.nan)
    return found


def _select_gemm(table: Any) -> Any:
    table = table[table.gemm_dtype.isin(("bfloat16", "fp8"))]
    return table.assign(dtype=table.gemm_dtype.astype(str))


def _describe_gemm(columns: Mapping[str, np.ndarray], chip: GPUChip) -> Description:
    m, n, k = (columns[name].astype(float) for name in "mnk")
    dtypes = columns["dtype"]
    narrow = (dtypes == "fp8").astype(float)
    width = np.where(narrow, 1.0, 2.0)
    weights, inputs, outputs = width * n * k, width * m * k, 2.0 * m * n
    sizes = [_log2(m), _log2(n), _log2(k)]
    peak = _by_dtype(chip.flops_per_s, dtypes) * _by_dtype(_REACHED_FLOPS["gemm"], dtypes)
    raw = [*sizes, narrow, m % 8 != 0, m % 64 != 0, _log2(weights), _log2(inputs), _log2(outputs)]
    return _described(
        chip,
        raw,
        sizes,
        [narrow],
        overhead_s=_by_dtype(_OVERHEAD_S["gemm"], dtypes),
        kept_bytes=weights,
        moved_bytes=weights + inputs + outputs,
        arithmetic_s=2 * m * n * k / peak,
        serial_s=4 * k / chip.clock_hz,
        tiles=[np.ceil(m / rows) * np.ceil(n / cols) for rows, cols in ((128, 128), (64, 64), (128, 256))],
    )


_ATTENTION = ("batch", "tokens", "heads", "kv_heads", "head_dim")


def _select_attention(table: Any) -> Any:
    full = (table.attn_dtype == "bfloat16") & (table.kv_cache_dtype == "bfloat16")
    if "window_size" in table:
        full &= table.window_size.fillna(0) == 0
    table = table[full]
    shared = table.num_key_value_heads.where(table.num_key_value_heads > 0, table.num_heads)
    tokens = table.isl + table.step.fillna(0)
    return table.assign(batch=table.batch_size, tokens=tokens, heads=table.num_heads, kv_heads=shared)


def _attention(columns: Mapping[str, np.ndarray]) -> tuple[list[np.ndarray], ...]:
    """The sizes as numbers, their features, octaves and kernels."""
    batch, tokens, heads, kv_heads, head_dim = sizes = [columns[name].astype(float) for name in _ATTENTION]
    sharing = heads / kv_heads
    logs = [_log2(batch), _log2(tokens), _log2(heads), _log2(kv_heads), _log2(sharing), _log2(head_dim)]
    kernels = [(head_dim == one).astype(float) for one in (64, 192, 256, 512)]
    features = [*logs, _log2(batch * tokens), *kernels, sharing == 1, sharing <= 8, sharing > 16]
    return sizes, features, logs, kernels


def _describe_context(columns: Mapping[str, np.ndarray], chip: GPUChip) -> Description:
    (batch, tokens, heads, kv_heads, head_dim), raw, octaves, kernels = _attention(columns)
    blocks = np.ceil(tokens / 128)
    return _described(
        chip,
        [*raw, tokens < 64],
        octaves,
        kernels,
        overhead_s=np.full(len(batch), _OVERHEAD_S["attn_context"]),
        kept_bytes=4 * batch * tokens * kv_heads * head_dim,
        moved_bytes=4 * batch * tokens * (heads + kv_heads) * head_dim,
        arithmetic_s=2
        * batch
        * heads
        * tokens**2
        * head_dim
        / chip.flops_per_s["bfloat16"]
        / _REACHED_FLOPS["attn_context"],
        serial_s=16 * blocks * head_dim / chip.clock_hz,
        tiles=[batch * heads * blocks, batch * heads * np.ceil(tokens / 64), batch * kv_heads * blocks],
    )


def _describe_generation(columns: Mapping[str, np.ndarray], chip: GPUChip) -> Description:
    (batch, tokens, heads, kv_heads, head_dim), raw, octaves, kernels = _attention(columns)
    cache = 4 * batch * tokens * kv_heads * head_dim
    return _described(
        chip,
        [*raw, _log2(heads / kv_heads) % 1 == 0],
        octaves,
        kernels,
        overhead_s=np.full(len(batch), _OVERHEAD_S["attn_generation"]),
        kept_bytes=cache,
        moved_bytes=cache + 4 * batch * heads * head_dim,
        arithmetic_s=4
        * batch
        * heads
        * tokens
        * head_dim
        / chip.flops_per_s["bfloat16"]
        / _REACHED_FLOPS["attn_generation"],
        serial_s=tokens * head_dim / chip.clock_hz / 4,
        tiles=[batch * kv_heads, batch * heads, batch * kv_heads * np.ceil(tokens / 256)],
    )


_CACHED = ("attn_dtype", "kv_cache_dtype")
_SIZES = ("batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim")
KINDS: Mapping[str, Kind] = {
    "gemm": Kind(("gemm_dtype",), ("m", "n", "k"), ("dtype", "m", "n", "k"), _select_gemm, _describe_gemm),
    "attn_context": Kind(_CACHED, _SIZES, _ATTENTION, _select_attention, _describe_context),
    "attn_generation": Kind(_CACHED, _SIZES, _ATTENTION, _select_attention, _describe_generation),
}


def describe(operations: Operations, chip: GPUChip) -> Description:
    """What the models see of operations on a chip."""
    return KINDS[operations.kind].describe(operations.columns, chip)


_BANDWIDTH, _WIDE, _NARROW, _CAPABILITY = _SPECIFIED = (
    "gpu.mem_bw",
    "gpu.bfloat16_tc_flops",
    "gpu.fp8_tc_flops",
    "gpu.sm_version",
)
"""The columns of `systems.csv`: bytes and operations a second, and ten times the compute capability; the last two may
be empty."""


def _sheet(path: Path) -> Any:
    """The specification of each system, by its name."""
    import pandas

    if not path.is_file():
        raise UserError(f"{path}: is missing; it specifies the systems that the tables were measured on")
    try:
        sheet = pandas.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no table in CSV: {error}") from None
    sheet = _checked(sheet, path, ("system",), _SPECIFIED)
    return sheet.assign(system=sheet.system.astype(str)).drop_duplicates("system").set_index("system")


def _chip(sheet: Any, path: Path, system: str) -> GPUChip:
    """A system that a sheet specifies."""
    if system not in sheet.index:
        raise UserError(f"{path}: the system {system!r} is missing. There are: {', '.join(sheet.index)}")
    specified = {column: float(sheet[column][system]) for column in _SPECIFIED}
    for column in (_BANDWIDTH, _WIDE):
        if not specified[column] > 0:
            raise UserError(f"{path}: {column} of {system!r} is {specified[column]:g}; allowed are positive numbers")
    peaks = {"bfloat16": specified[_WIDE]} | ({"fp8": specified[_NARROW]} if specified[_NARROW] > 0 else {})
    try:
        return GPUChip.of_specification(system, specified[_BANDWIDTH], peaks, specified[_CAPABILITY] / 10)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _checked(table: Any, path: Path, names: Sequence[str], numbers: Sequence[str]) -> Any:
    """A table that has these columns, and numbers in those of `numbers`."""
    import pandas

    for column in (*names, *numbers):
        if column not in table:
            raise UserError(f"{path}: the column {column!r} is missing. There are: {', '.join(map(str, table))}")
    read: dict[str, Any] = {column: pandas.to_numeric(table[column], errors="coerce") for column in numbers}
    for column, values in read.items():
        wrong = table[column][values.isna() & table[column].notna()]
        if len(wrong):
            raise UserError(f"{path}: the column {column!r} has {wrong.iloc[0]!r}; allowed are numbers")
    return table.assign(**read)


def read(folders: Sequence[Path], kind: str) -> list[Measured]:
    """What was measured of a kind of operation, of each system by the newest version of the software.

    Rows that were measured while the power was measured too are left out, for that changes latencies.

    Raises:
        UserError: there is no such kind, folder, table, column or row, or a system is not specified.
    """
    import pandas

    if kind not in KINDS:
        raise UserError(f"unknown kind of operation {kind!r}{did_you_mean(kind, tuple(KINDS))}")
    found: dict[str, Measured] = {}
    for folder in folders:
        paths = sorted(folder.glob(f"{kind}_*.parquet"))
        if not paths:
            raise UserError(f"{folder}: has no table {kind}_<framework>.parquet")
        sheet = _sheet(folder / SYSTEMS)
        for path in paths:
            try:
                whole = pandas.read_parquet(path)
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: is no table in Parquet: {error}") from None
            own = KINDS[kind]
            whole = _checked(whole, path, ("system", "version", *own.dtypes), ("latency_ms", *own.numbers))
            table = own.select(whole)
            if "power_W" in table:
                table = table[table.power_W.isna()]
            for system, rows in table.groupby("system", observed=True):
                name = str(system)
                one = _newest(_chip(sheet, folder / SYSTEMS, name), kind, rows)
                if len(one.latency_s) and (name not in found or _order(found[name].version) < _order(one.version)):
                    found[name] = one
    if not found:
        raise UserError(
            f"{', '.join(map(str, folders))}: the tables of {kind} have no row that could be learnt from: in bfloat16 "
            "or fp8 on a system that has it, with full windows, and measured without the power"
        )
    return [found[name] for name in sorted(found)]


def _newest(chip: GPUChip, kind: str, rows: Any) -> Measured:
    version = max(rows.version.astype(str).unique(), key=_order)
    rows = rows[rows.version.astype(str) == version].dropna(subset=["latency_ms", *KINDS[kind].columns])
    columns = {name: rows[name].to_numpy() for name in KINDS[kind].columns}
    latency_s = rows.latency_ms.to_numpy().astype(float) / 1e3
    good = np.isfinite(latency_s) & (latency_s > 0)
    for name, values in columns.items():
        good &= np.isin(values.astype(str), tuple(chip.flops_per_s)) if name == "dtype" else values > 0
    return Measured(chip, version, Operations(kind, columns)[good], latency_s[good])


def _order(version: str) -> Any:
    """Versions in order; what is no version comes before all that are."""
    try:
        return (1, Version(version))
    except InvalidVersion:
        return (0, [int(part) if part.isdigit() else 0 for part in re.findall(r"\d+|\D+", version)])
