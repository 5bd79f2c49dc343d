"""The operations of many candidates at once, as arrays: a hundred thousand are described in less than a second.

A candidate is a row of indices, one a knob (`Encoding`). What it runs is put together of tables: the sizes of its
attention blocks and of its feed-forward blocks, which architecture and sparsity decide, and how matrices and caches are
stored and multiplied, which precision and schedule decide. A row of a table is made from the first candidate that needs
it, by the code that counts the operations of one candidate (`operations.py`), and serves all that agree with it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, cast

import numpy as np

from cosearch import axes
from cosearch.architecture.attention import AttentionShape
from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.architecture.decoder import cached_as, scheduled_as
from cosearch.architecture.feedforward import FEEDFORWARD, FeedForwardShape
from cosearch.architecture.linear import MatrixStorage
from cosearch.architecture.shape import ABSORBED, DECIDES, EMBEDDING, VOCABULARY, DecoderShape
from cosearch.core.candidate import Candidate
from cosearch.core.errors import Rejected
from cosearch.core.space import Space, variant_knobs
from cosearch.core.workload import OperatingPoint
from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS
from cosearch.latency.encoding import Encoding, Interned, Table
from cosearch.latency.operations import (
    STATE_BYTES,
    Role,
    attention_by,
    cache_layers,
    cached_bytes,
    product_by,
    read_fraction,
    role_of,
)
from cosearch.precision import Precision
from cosearch.schedule import Schedule
from cosearch.sparsity.criteria import CRITERION

QUANTITIES = ("count", "multiplications", "read_bytes", "outputs")
"""What is known of an operation in numbers: how often it runs, what it multiplies, the bytes it reads, and the numbers
it gives; of an attention the latter are those that its cache has room for, all of which are copied where it is not
written in place."""

_PRODUCT = ("precision.weights", "precision.rules", "precision.matmul_inputs", "precision.activations")
_PRODUCT += ("schedule.matmul", "schedule.weight_layout", "schedule.attention", "schedule.layers", "schedule.fusion")
_CACHE = ("precision.kv_cache", "precision.activations", "schedule.attention", "schedule.cache_layout")
_CACHE += ("schedule.layers", "schedule.fusion")
_HOW = ("precision.activations", "schedule.layers", "schedule.fusion")
_NOT_CONTEXT = {*_PRODUCT, *_CACHE, *_HOW}


@dataclass(frozen=True)
class Entry:
    """One kind of operation by its sizes: `role` as in `operations.py`, [rows, columns] of a matrix, or what attention
    there is. `group` tells apart what precision may store differently: matrices by the rules that may match them,
    attention by the layer that has its cache."""

    role: Role
    rows: int = 0
    columns: int = 0
    group: int = 0
    compression: Any = None
    attention: AttentionShape | None = None

    @property
    def tokens(self) -> tuple[str, ...]:
        """What it is, in words."""
        words = [f"role={self.role}"]
        if self.compression is not None:
            kept = self.compression.of_groups
            words.append(f"compression={type(self.compression).__name__}{'' if kept is None else kept}")
        if self.attention is not None:
            words.append(f"attention={type(self.attention).__name__}")
        if isinstance(self.attention, SoftmaxShape):
            marks = {"blocks": self.attention.blocks, "borrows": self.attention.borrows}
            marks |= {"shared": self.attention.kv_heads == 1, "window": self.attention.window}
            words += [name for name, there in marks.items() if there]
        return tuple(words)

    @property
    def sizes(self) -> list[float]:
        """Its sizes as features of even scale; kernels take other ways where sizes are no multiples of their tiles."""
        if self.role in ("block", "call"):
            return [0.0] * 6
        whole = [float(size % tile == 0) for tile in (64, 128) for size in (self.rows, self.columns)]
        return [math.log(max(self.rows, 1) / 128), math.log(max(self.columns, 1) / 128), *whole]


@dataclass(frozen=True)
class Storage:
    """How the operand of an operation is stored and which implementation runs it, in which numbers, in what loop over
    the layers and in how large a call."""

    by: str
    format: str = ""
    layout: str = ""
    inputs: str = ""
    dtype: str = ""
    layers: str = ""
    fusion: str = ""

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(f"{name}={value}" for name, value in vars(self).items() if value)


@dataclass(frozen=True)
class Batch:
    """The operations of n candidates, of S places some of which are empty (a count of 0): `entry` and `storage` [n, S]
    and `context` [n] are places in the lists of `Operations`; `size` [n, S, quantities]. `weight_bytes` and
    `cache_bytes` [n] are what is stored. Of a candidate that is not `legal` nothing is known."""

    entry: np.ndarray
    storage: np.ndarray
    context: np.ndarray
    size: np.ndarray
    weight_bytes: np.ndarray
    cache_bytes: np.ndarray
    legal: np.ndarray


@dataclass(frozen=True)
class _Blocks:
    """Some operations of a shape: entries, sizes [S, 4] without bytes, and bytes by format [S, formats] that are read
    and stored."""

    entries: list[int]
    sizes: np.ndarray
    read: np.ndarray
    stored: np.ndarray


@dataclass(frozen=True)
class _Counted:
    """The quantities of an operation, and its bytes by format that are read and stored."""

    size: np.ndarray
    read_bytes: np.ndarray
    stored_bytes: np.ndarray

    def plus(self, other: "_Counted") -> "_Counted":
        """Both together."""
        return _Counted(
            self.size + other.size, self.read_bytes + other.read_bytes, self.stored_bytes + other.stored_bytes
        )


class Operations:
    """Describes candidates of one space at one operating point."""

    def __init__(self, space: Space, point: OperatingPoint) -> None:
        self.encoding, self._point = Encoding(space), point
        known = self.encoding.values
        own = {f"architecture.{name}" for name in variant_knobs("architecture.feedforward", FEEDFORWARD)}
        own.add("architecture.feedforward")
        # Which weights go is not how many.
        sparse = [n for n in known if n.startswith("sparsity.") and n.partition(".")[2] not in CRITERION]
        built = [name for name in known if name.startswith("architecture.")]
        both = ["architecture.width", "architecture.depth"]
        context = [name for name in known if name.startswith(("precision.", "schedule.")) and name not in _NOT_CONTEXT]
        attention = [*(name for name in built if name not in own), *sparse]
        self._attention = Table(self.encoding, attention, partial(self._blocks_of, "attention"))
        self._feedforward = Table(self.encoding, [*both, *own, *sparse], partial(self._blocks_of, "feedforward"))
        self._product = Table(self.encoding, _PRODUCT, lambda candidate: candidate)
        self._cache = Table(self.encoding, _CACHE, lambda candidate: candidate)
        self._plain = Table(self.encoding, _HOW, lambda candidate: candidate)
        self._context = Table(self.encoding, context, self._words(context))
        self._steps = np.zeros(0)
        self.entries, self.storages = Interned(), Interned()
        self._groups: dict[Any, int] = {}
        self._paths: list[str] = []
        self._patterns = sorted({rule.rpartition("=")[0] for rules in known["precision.rules"] for rule in rules})  # pyright: ignore[reportGeneralTypeIssues]
        formats = {str(value) for value in known["precision.weights"]}
        formats |= {rule.rpartition("=")[2] for rules in known["precision.rules"] for rule in rules}  # pyright: ignore[reportGeneralTypeIssues]
        caches = {
            one for value in known["precision.kv_cache"] for one in (value if isinstance(value, tuple) else [value])
        }
        caches.add("float32")
        self._formats = {name: at for at, name in enumerate(sorted(formats))}
        pairs = [
            (str(cache), str(dtype)) for cache in sorted(map(str, caches)) for dtype in known["precision.activations"]
        ]
        self._caches = {pair: at for at, pair in enumerate(pairs)}
        # Where layers may be stored differently, their blocks are told apart.
        self._by_layer = any(isinstance(value, tuple) for value in known["precision.kv_cache"])
        self._by_layer |= any(pattern != EMBEDDING for pattern in self._patterns)
        self._known_blocks: dict[Any, list[tuple[int, _Counted]]] = {}
        self._stacked: dict[str, tuple[int, Any]] = {}
        self._storage_of: dict[str, np.ndarray] = {}
        self._runs = np.zeros((0, 0), np.int32)
        self._group(EMBEDDING)  # which every candidate has

    @property
    def contexts(self) -> list[tuple[str, ...]]:
        """What else was chosen, in words, by `Batch.context`."""
        return self._context.made

    def __call__(self, rows: np.ndarray) -> Batch:
        """Describe candidates, rows of `self.encoding`."""
        parts = [(table, table.find(rows)) for table in (self._attention, self._feedforward)]
        product, cache, context = (table.find(rows) for table in (self._product, self._cache, self._context))
        for words in self.contexts[len(self._steps) :]:
            self._steps = np.append(self._steps, self._steps_of(words))
        stacked = [
            self._stack(name, table) for name, (table, _) in zip(("attention", "feedforward"), parts, strict=True)
        ]
        numbers = [number for _, number in parts]

        def joined(name: str) -> np.ndarray:
            return np.concatenate([one[name][at] for one, at in zip(stacked, numbers, strict=True)], axis=1)

        entry, size = joined("entry"), joined("size")
        storage, column = self._stored(entry, product, cache, self._plain.find(rows))
        places = stacked[0]["entry"].shape[1]
        columns = (column[:, :places], column[:, places:])

        def bytes_of(name: str) -> np.ndarray:
            each = zip(stacked, numbers, columns, strict=True)
            return np.concatenate(
                [one[name][at[:, None], np.arange(own.shape[1]), own] for one, at, own in each], axis=1
            )

        stored = bytes_of("stored")
        size[:, :, 2] += bytes_of("read")
        size[:, :, 0] /= np.where(self._is_call[entry], self._steps[context][:, None], 1)
        held = np.where(self._is_cache[entry], stored, 0).sum(axis=1)
        legal = stacked[0]["legal"][numbers[0]] & stacked[1]["legal"][numbers[1]]
        return Batch(entry, storage, context, size, stored.sum(axis=1) - held, held, legal)

    def _blocks_of(self, which: str, candidate: Candidate) -> "_Blocks | None":
        try:
            return self._blocks(axes.served_shape(candidate), which)
        except Rejected:
            return None

    def _blocks(self, shape: DecoderShape, which: str) -> _Blocks:
        merged: dict[int, _Counted] = {}

        def add(number: int, counted: _Counted) -> None:
            before = merged.get(number)
            merged[number] = counted if before is None else counted.plus(before)

        for index, layer in enumerate(shape.layers):
            block = getattr(layer, which)
            if block is not None:
                for number, counted in self._block(shape, which, block, index):
                    add(number, counted)
        if which == "attention":
            add(*self._matrix(shape, EMBEDDING, (shape.width, VOCABULARY), 1.0, 1.0))
            add(self.entries(Entry("call")), self._counted((1.0, 0.0, 0.0, 0.0)))
        each = list(merged.values())
        sizes, read, stored = (
            np.array([getattr(one, name) for one in each]) for name in ("size", "read_bytes", "stored_bytes")
        )
        return _Blocks(list(merged), sizes, read, stored)

    def _block(
        self, shape: DecoderShape, which: str, block: AttentionShape | FeedForwardShape, index: int
    ) -> "list[tuple[int, _Counted]]":
        """What one block of a layer runs; made once for all that are alike."""
        where = (index, cache_layers(shape)[index]) if self._by_layer else (0, 0)
        key = (which, shape.width, shape.compression, block, *where)
        if key in self._known_blocks:
            return self._known_blocks[key]
        found = [
            (self.entries(Entry("block")), self._counted((1.0, 0.0, 0.0, float(self._point.tokens * shape.width))))
        ]
        for name, sizes in block.linears(shape.width).items():
            path = f"layers.{index}.{which}.{name}"
            used, read = (read_fraction(shape, path, tokens) for tokens in (1, self._point.tokens))
            found.append(self._matrix(shape, path, sizes, used, read))
        if which == "attention":
            found.append(self._cached(cast(AttentionShape, block), where[1]))
        self._known_blocks[key] = found
        return found

    def _matrix(
        self, shape: DecoderShape, path: str, sizes: tuple[int, ...], used: float, read: float
    ) -> "tuple[int, _Counted]":
        """The products with a matrix, or a stack of them of which a token uses a part, and all tokens read one."""
        *stack, rows, columns = sizes
        compression, tokens = shape.compression_of(path), self._point.tokens
        entry = Entry(role_of(path, sizes), rows, columns, self._group(path), compression)
        stored_rows = rows if compression is None else compression.stored_rows(rows)
        count, matrices = used * math.prod(stack), math.prod(stack)
        bytes_ = [_bits(name, compression, rows, columns) / 8 * matrices for name in self._formats]
        size = (count, tokens * count * stored_rows * columns, 0.0, tokens * count * columns)
        return self.entries(entry), self._counted(size, [read * one for one in bytes_], bytes_)

    def _cached(self, attention: AttentionShape, layer: int) -> "tuple[int, _Counted]":
        """Attention to cached tokens, which `layer` has, or the update of a state."""
        point = self._point
        reads, tensors = (each(point.batch, point.context) for each in (attention.reads, attention.cache))
        states = sum(math.prod(state) for state in attention.states(point.batch, point.context).values())
        rows, columns = (sum(math.prod(one[2:]) for one in each.values()) for each in (reads, tensors))
        role: Role = "attention" if reads else "state"
        entry = Entry(role, rows, columns, layer, None, attention)
        multiplied = point.batch * attention.multiplications(point.tokens // point.batch, point.context)
        capacity = sum(math.prod(tensor) for tensor in tensors.values())
        read, stored = (
            [sum(cached_bytes(*pair, one) for one in each.values()) + STATE_BYTES * states for pair in self._caches]
            for each in (reads, tensors)
        )
        return self.entries(entry), self._counted((1.0, multiplied, 0.0, float(capacity)), read, stored)

    def _counted(self, size: Sequence[float], read: Sequence[float] = (), stored: Sequence[float] = ()) -> "_Counted":
        width = max(len(self._formats), len(self._caches))
        padded = [np.array([*each, *[0.0] * (width - len(each))]) for each in (read, stored)]
        return _Counted(np.array(size), *padded)

    def _group(self, path: str) -> int:
        key = (tuple(fnmatchcase(path, pattern) for pattern in self._patterns), path.endswith(DECIDES))
        key = (*key, path.endswith(ABSORBED), path == EMBEDDING)
        if key not in self._groups:
            self._groups[key] = len(self._paths)
            self._paths.append(path)
        return self._groups[key]

    def _stack(self, name: str, table: Table) -> dict[str, np.ndarray]:
        """A table's rows as arrays of equal length; made anew where there are more of them."""
        count, arrays = self._stacked.get(name, (0, {}))
        if count == len(table.made) and arrays:
            return arrays
        places = max([len(one.entries) for one in table.made if one is not None], default=1)
        width = max(len(self._formats), len(self._caches))
        empty = self.entries(Entry("block"))
        arrays = {
            "entry": np.full((len(table.made), places), empty, np.int32),
            "size": np.zeros((len(table.made), places, len(QUANTITIES)), np.float32),
            "read": np.zeros((len(table.made), places, width), np.float32),
            "stored": np.zeros((len(table.made), places, width)),
            "legal": np.array([one is not None for one in table.made]),
        }
        for number, one in enumerate(table.made):
            if one is not None:
                filled = slice(len(one.entries))
                arrays["entry"][number, filled] = one.entries
                arrays["size"][number, filled] = one.sizes
                arrays["read"][number, filled], arrays["stored"][number, filled] = one.read, one.stored
        self._stacked[name] = len(table.made), arrays
        entries: list[Entry] = self.entries.all
        self._is_cache = np.array([entry.attention is not None for entry in entries])
        self._is_call = np.array([entry.role == "call" for entry in entries])
        self._entry_group = np.array([entry.group for entry in entries])
        self._has_matrix = np.array([entry.columns > 0 and entry.attention is None for entry in entries])
        return arrays

    def _stored(
        self, entry: np.ndarray, product: np.ndarray, cache: np.ndarray, plain_number: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The storage of each operation [n, S], and the column that its bytes stand in."""
        plain = self._lookup(self._plain, self._plain_storage, 1)[0, plain_number, 0]
        storage = np.broadcast_to(plain[:, None], entry.shape)
        column = np.zeros(entry.shape, np.int64)
        for own, number, table, make in (
            (self._has_matrix, product, self._product, self._product_storage),
            (self._is_cache, cache, self._cache, self._cache_storage),
        ):
            group = np.where(own, self._entry_group, 0)
            of = self._lookup(table, make, int(group.max()) + 1)
            there, chosen = own[entry], of[group[entry], number[:, None]]
            storage = np.where(there, chosen[..., 0], storage)
            column = np.where(there, chosen[..., 1], column)
        return self._run_by(entry, storage), column

    def _lookup(self, table: Table, make: Callable[[int, Candidate], tuple[int, int]], groups: int) -> np.ndarray:
        """[groups, rows of the table, 2]: storage and column."""
        name = make.__name__
        before = self._storage_of.get(name, np.zeros((0, 0, 2), np.int64))
        if before.shape[:2] == (groups, len(table.made)):
            return before
        after = np.zeros((groups, len(table.made), 2), np.int64)
        after[: before.shape[0], : before.shape[1]] = before
        for group in range(groups):
            first = before.shape[1] if group < before.shape[0] else 0
            for number in range(first, len(table.made)):
                after[group, number] = make(group, table.made[number])
        self._storage_of[name] = after
        return after

    def _product_storage(self, group: int, candidate: Candidate) -> tuple[int, int]:
        path = self._paths[group]
        precision, schedule = Precision.of(candidate.precision), Schedule.of(candidate.schedule)
        storage = scheduled_as(_PLAIN, precision, schedule, path)
        by = schedule.matmul
        if path.endswith(ABSORBED):
            by = product_by("absorbed", schedule, storage.product(1, (1, 1), precision.activations))
        how = (precision.activations, schedule.layers, schedule.fusion)
        number = self.storages(Storage(by, storage.format, storage.layout, storage.inputs, *how))
        return number, self._formats[storage.format]

    def _cache_storage(self, group: int, candidate: Candidate) -> tuple[int, int]:
        precision, schedule = Precision.of(candidate.precision), Schedule.of(candidate.schedule)
        cache = cached_as(precision, schedule, group)
        how = (precision.activations, schedule.layers, schedule.fusion)
        number = self.storages(Storage(schedule.attention, cache.format, cache.layout, "", *how))
        return number, self._caches[cache.format, precision.activations]

    def _plain_storage(self, group: int, candidate: Candidate) -> tuple[int, int]:
        schedule = Schedule.of(candidate.schedule)
        activations = Precision.of(candidate.precision).activations
        return self.storages(Storage("dot", "", "", "", activations, schedule.layers, schedule.fusion)), 0

    def _run_by(self, entry: np.ndarray, storage: np.ndarray) -> np.ndarray:
        """`storage`, with the lowering "dot" in the place of kernels that do not run an entry."""
        count = (len(self.entries.all), len(self.storages.all))
        if self._runs.shape != count:
            runs = np.full(count, _UNKNOWN, np.int32)
            runs[: self._runs.shape[0], : self._runs.shape[1]] = self._runs
            self._runs = runs
        found = self._runs[entry, storage]
        unknown = found == _UNKNOWN
        if not unknown.any():
            return found
        for one in np.unique(entry[unknown].astype(np.int64) * count[1] + storage[unknown]).tolist():
            at, stored = divmod(one, count[1])
            self._runs[at, stored] = self._resolved(self.entries.all[at], self.storages.all[stored])
        return self._runs[entry, storage]

    def _resolved(self, entry: Entry, storage: Storage) -> int:
        schedule = Schedule(matmul=storage.by, attention=storage.by)
        by = storage.by
        if entry.attention is not None and storage.by in ATTENTION_KERNELS:
            over = None
            if isinstance(entry.attention, SoftmaxShape):
                cache = replace(cached_as(Precision(), schedule, 0), format=storage.format, layout=storage.layout)
                slots = entry.attention.reads(self._point.batch, self._point.context)["key"][1]
                over = entry.attention.over(cache, self._point.batch, slots)
            by = attention_by(entry.attention, over, schedule, self._point.phase)
        elif entry.role != "absorbed" and entry.columns and storage.by in MATMUL_KERNELS:
            stored = MatrixStorage(storage.format, storage.layout, storage.by, storage.inputs, entry.compression)
            product = stored.product(self._point.tokens, (entry.rows, entry.columns), "float32")
            by = product_by(entry.role, schedule, product)
        return self.storages(replace(storage, by=by))

    def _steps_of(self, words: Sequence[str]) -> int:
        """How many steps of a decode program one call runs."""
        told = [int(word.partition("=")[2]) for word in words if word.startswith("schedule.steps=")]
        return min(told[0], self._point.context) if told and self._point.phase == "decode" else 1

    def _words(self, names: Sequence[str]) -> Callable[[Candidate], tuple[str, ...]]:
        def words(candidate: Candidate) -> tuple[str, ...]:
            point = candidate.point
            return tuple(f"{name}={point[name]}" for name in names if name in point)

        return words


_UNKNOWN = -1
_PLAIN = DecoderShape(1, ())
"""Of a shape `scheduled_as` asks only how a matrix is compressed, which entries know themselves."""


@cache
def _bits(name: str, compression: Any, rows: int, columns: int) -> float:
    """Stored bits of a matrix; 0 where the format does not hold it, which no legal candidate asks for."""
    storage = MatrixStorage(name, compression=compression)
    return 0 if storage.why_not((rows, columns)) else storage.bits((rows, columns))
