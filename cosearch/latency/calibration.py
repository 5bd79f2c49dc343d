"""Calibrations: what few operations took on a chip at hand, chosen for what they tell, and the software they ran with.

A calibration is a file in the cache folder, `calibrations/<target>.json`. Copied to another machine it serves there,
where that chip is not.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cosearch.core.candidate import content_hash
from cosearch.core.errors import UserError
from cosearch.core.files import write_json
from cosearch.core.target import Target
from cosearch.kernels import MATMUL_KERNELS
from cosearch.latency import pretrained, roofline
from cosearch.latency.table_model import OperationModel
from cosearch.latency.tables import GPUChip, Operations, describe
from cosearch.latency.transfer import Function, Linear, Posterior, Prior, Smooth
from cosearch.paths import cache_dir
from cosearch.precision import FORMATS
from cosearch.schedule.matmul import LAYOUTS, MATMULS
from cosearch.targets import TARGETS
from cosearch.targets.gpu import GPU

VERSION = 1
_POOL = 500
"""Operations that the ones to measure are chosen from."""
_SCORES = 0.125
"""Of a chip's memory, that the scores of an attention may take which is measured; beside them are their softmax, and
copies of its operands."""
_PRODUCT_DEVIATION = 1.0
"""Of the logarithm, before any is measured, by which products of a format and lowering are off the roofline: XLA takes
from 1 to 16 times as long as memory does."""
_BEYOND = 0.1
"""In parts of the range of a feature: operations further outside of the tables are not predicted from them."""
DRIFT = 0.15
"""A measurement that repeats an older one to within this part agrees with it; medians of operations on an undisturbed
machine do so to some 5 %."""


@dataclass(frozen=True)
class Shot:
    """One operation that was measured: its kind and sizes, the seconds it took, as a median and raw samples, and the
    part of these that was taken while something else ran on the machine."""

    kind: str
    columns: Mapping[str, Any]
    latency_s: float
    samples_s: Sequence[float]
    contended: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """What was measured of `target` with the versions in `software`; `checks` were measured too, to see how well they
    are predicted from the shots."""

    target: str
    software: Mapping[str, Any]
    shots: tuple[Shot, ...]
    checks: tuple[Shot, ...]

    @property
    def fingerprint(self) -> str:
        """Of what predictions are adapted by."""
        return content_hash([(one.kind, one.columns, one.latency_s) for one in self.shots])

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Raises UserError where the file is damaged or of another version."""
        try:
            data = json.loads(path.read_text())
            if data["version"] != VERSION:
                raise UserError(f"{path}: version {data['version']!r}; this cosearch reads version {VERSION}")
            shots, checks = (tuple(Shot(**one) for one in data[name]) for name in ("shots", "checks"))
            if not shots:
                raise UserError(
                    f"{path}: is of no operation. Make one: python -m cosearch calibrate target={data['target']}"
                )
            return cls(data["target"], data["software"], shots, checks)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: is no calibration, or a damaged one: {error}") from None


def path_of(target: str) -> Path:
    """Where the calibration of a target is kept."""
    return cache_dir() / "calibrations" / f"{target}.json"


def stored(target: str) -> Calibration | None:
    """The calibration of a target, if there is one."""
    path = path_of(target)
    return Calibration.load(path) if path.is_file() else None


@dataclass(frozen=True)
class Subject:
    """Operations of one kind on one chip: what is expected of them before they are measured."""

    kind: str
    function: Callable[[Operations], Function]
    prior: Prior
    draw: Callable[[np.random.Generator], Operations]
    """Operations that may be measured."""
    knows: Callable[[Operations], np.ndarray] = lambda operations: np.ones(len(operations), bool)
    """Which operations are like those that were learnt from; of others nothing should be said."""

    def adapted(self, calibration: Calibration | None, operations: Operations) -> tuple[Posterior, np.ndarray]:
        """What is known of `operations` after a calibration, and their rows in it."""
        shots = [] if calibration is None else [one for one in calibration.shots if one.kind == self.kind]
        columns = {  # arrays of their own, for those of `operations` hold strings no longer than theirs
            name: np.array([*(one.columns[name] for one in shots), *values.tolist()])
            for name, values in operations.columns.items()
        }
        function = self.function(Operations(self.kind, columns))
        logarithms = np.log([one.latency_s for one in shots])
        rows = np.arange(len(shots), len(shots) + len(operations))
        return self.prior.adapt(function, np.arange(len(shots)), logarithms), rows


def gpu_chip(target: Target) -> GPUChip | None:
    """A GPU as operation models see it; None of what no literal describes.

    Multiprocessors, clock and L2 cache follow from its datasheet's peaks and its compute capability, as those of the
    chips do that models learnt from: of these no more is known, and a literal's boost clock would be another quantity.
    """
    chip = TARGETS[target.name] if target.platform == "gpu" else None
    if not isinstance(chip, GPU):
        return None
    peaks = {"bfloat16": chip.peak_flops_per_s["bfloat16"]}
    if "float8_e4m3fn" in chip.peak_flops_per_s:
        peaks["fp8"] = chip.peak_flops_per_s["float8_e4m3fn"]
    major, minor = chip.capability
    return GPUChip.of_specification(chip.name, chip.bandwidth_bytes_per_s, peaks, major + minor / 10)


def subjects(target: Target, models: pretrained.Pretrained | None = None) -> list[Subject]:
    """What can be calibrated of a chip: of GPUs, what the operation `models` know; elsewhere, products.

    Raises:
        UserError: operation models are damaged.
    """
    chip = gpu_chip(target)
    if chip is None:
        return [
            Subject(
                "product", lambda operations: _products(operations, target), Prior.fit([], []), _draw_products(target)
            )
        ]
    return [_of_gpu(model, chip, target) for model in (models or pretrained.load()).models.values()]


def _of_gpu(model: OperationModel, chip: GPUChip, target: Target) -> Subject:
    def knows(operations: Operations) -> np.ndarray:
        return model.network.outside(describe(operations, chip)) <= _BEYOND

    expected = functools.partial(model.function, chip=chip)
    return Subject(model.kind, expected, model.prior, _draw(model.kind, chip, target), knows)


def _draw(kind: str, chip: GPUChip, target: Target) -> Callable[[np.random.Generator], Operations]:
    """Sizes as models that are served have them, none so large that it does not fit: XLA's attention keeps its scores
    in memory, as float32."""

    def draw(rng: np.random.Generator) -> Operations:
        if kind == "gemm":
            columns = {
                "dtype": rng.choice(sorted(chip.flops_per_s), _POOL),
                "m": 2 ** rng.integers(0, 14, _POOL),
                "n": rng.choice([512, 1024, 2048, 4096, 6144, 8192, 12288, 16384], _POOL),
                "k": rng.choice([512, 1024, 2048, 4096, 6144, 8192, 12288, 16384], _POOL),
            }
            return Operations(kind, columns)
        kv_heads = 2 ** rng.integers(0, 4, 2 * _POOL)
        columns = {
            "batch": 2 ** rng.integers(0, 6, 2 * _POOL),
            "tokens": 2 ** rng.integers(6, 13, 2 * _POOL),
            "heads": kv_heads * 2 ** rng.integers(0, 4, 2 * _POOL),
            "kv_heads": kv_heads,
            "head_dim": rng.choice([64, 128], 2 * _POOL),
        }
        queries = columns["tokens"] if kind == "attn_context" else 1
        scores_bytes = 4 * columns["batch"] * columns["heads"] * queries * columns["tokens"]
        fitting = np.flatnonzero(scores_bytes <= _SCORES * target.capacity_bytes)
        return Operations(kind, columns)[fitting[:_POOL]]

    return draw


def _draw_products(target: Target) -> Callable[[np.random.Generator], Operations]:
    kernels = [name for name in MATMUL_KERNELS.names() if _has(name, target.platform)]
    formats = [name for name in FORMATS.names() if FORMATS[name].weights]

    def draw(rng: np.random.Generator) -> Operations:
        by = rng.choice([*MATMULS, *kernels], _POOL)
        kernel_layouts = {name: MATMUL_KERNELS[name].layout for name in kernels}
        layouts = rng.choice(LAYOUTS, _POOL)
        columns = {
            "tokens": 2 ** rng.integers(0, 6, _POOL),
            "rows": 2 ** rng.integers(7, 12, _POOL),
            "columns": 2 ** rng.integers(7, 12, _POOL),
            "stored": rng.choice(formats, _POOL),
            "by": by,
            "layout": np.array([kernel_layouts.get(name, own) for name, own in zip(by, layouts, strict=True)]),
        }
        return Operations("product", columns)

    return draw


def _has(kernel: str, platform: str) -> bool:
    one = MATMUL_KERNELS[kernel]
    return platform in one.platforms and one.why_unavailable() is None


def _products(operations: Operations, target: Target) -> Function:
    """Products over the roofline of a chip's measured peaks: how far off is learnt by lowering and format."""
    columns = operations.columns
    tokens, rows, outs = (columns[name].astype(float) for name in ("tokens", "rows", "columns"))
    width = np.array([_stored_bytes(str(name)) for name in columns["stored"]])
    memory_s = (width * rows * outs + 4 * tokens * (rows + outs)) / target.bandwidth_bytes_per_s
    arithmetic_s = 2 * tokens * rows * outs / roofline.peak_flops_per_s(target, "float32")
    busy_s = np.hypot(memory_s, arithmetic_s)
    roofline_s = target.overhead_s + busy_s
    share = busy_s / roofline_s
    parts = np.stack([1 - share, share * (memory_s / busy_s) ** 2, share * (arithmetic_s / busy_s) ** 2], axis=1)

    def one_hot(*names: str) -> np.ndarray:
        joined = np.array(
            [" ".join(words) for words in zip(*(columns[name].astype(str) for name in names), strict=True)]
        )
        return (joined[:, None] == np.unique(joined)[None, :]).astype(float)

    octaves = np.stack([np.log2(tokens), np.log2(rows), np.log2(outs)], axis=1)
    lowerings = one_hot("by")
    near = np.concatenate([octaves, 8 * lowerings], axis=1)
    stored = one_hot("by", "stored", "layout")
    blocks = (
        Linear("scale", np.ones((len(operations), 1)), 0.5),
        Linear("lowering", lowerings, 0.5),
        Linear("storage", stored, _PRODUCT_DEVIATION),
        Linear("regimes", np.einsum("ns,nl->nsl", parts, lowerings).reshape(len(operations), -1), 0.5),
        Smooth("sizes", near / 4.0, 0.3),
    )
    return Function(np.log(roofline_s), blocks)


@functools.cache
def _stored_bytes(name: str) -> float:
    """Bytes of a weight in a format, scales among them."""
    spec = FORMATS[name].spec(128, 128, "in_out")
    return sum(part.size * part.dtype.itemsize for part in spec.values()) / 128**2


def choose(subject: Subject, count: int, checks: int, seed: int) -> tuple[Operations, Operations]:
    """The `count` operations that tell most of all others, and random ones to check by."""
    rng = np.random.default_rng(seed)
    pool = subject.draw(rng)
    function = subject.function(pool)
    chosen = subject.prior.choose(function, np.arange(len(pool)), count)
    others = np.setdiff1d(np.arange(len(pool)), chosen)
    return pool[chosen], pool[rng.choice(others, min(checks, len(others)), replace=False)]
