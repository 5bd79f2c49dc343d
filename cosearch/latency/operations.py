"""What a candidate runs in one run of an operating point, from its choices alone: the operations, and which
implementation really runs each. Nothing is compiled.

A new kind of block says what it runs where it is built (`linears`, `cache`, `multiplications`), and is here by that; an
operation that no block tells of is to be added to `operations`.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cosearch import axes
from cosearch.architecture.attention import AttentionShape
from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.architecture.cache import KVCache
from cosearch.architecture.decoder import cached_as, scheduled_as
from cosearch.architecture.shape import ABSORBED, DECIDES, EMBEDDING, DecoderShape
from cosearch.core.candidate import Candidate
from cosearch.core.workload import OperatingPoint, Phase
from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS, CachedAttention, Product
from cosearch.precision import Precision
from cosearch.schedule import Schedule

Role = Literal["matrix", "expert", "small", "absorbed", "embedding", "attention", "state", "block", "call"]
ROLES: tuple[Role, ...] = get_args(Role)
"""What an operation is for: the product with a layer's matrix, with an expert of a stack, with a matrix of few columns
(`DECIDES`), with one that a decode step multiplies with something else (`ABSORBED`), with the embedding; attention to
cached tokens, or the update of a state of fixed size; what a block does beside those, its norm and its sum; and the
call of the program itself, which is none of a run's operations but is known of a batch (`batch.py`)."""


@dataclass(frozen=True)
class Operation:
    """`count` runs of one operation: the bytes that are stored for it, those that all its runs read, and their
    floating-point operations. `product` or `attention` are the sizes, formats and layouts, in the words that kernels
    are asked in; what updates a state has neither."""

    count: float
    stored_bytes: float
    read_bytes: float
    flops: float
    product: Product | None = None
    attention: CachedAttention | None = None


def operations(candidate: Candidate, point: OperatingPoint) -> list[Operation]:
    """The products and attentions of one run of an operating point."""
    shape, precision = axes.served_shape(candidate), Precision.of(candidate.precision)
    return list(operations_of(shape, precision, Schedule.of(candidate.schedule), point))


def operations_of(
    shape: DecoderShape, precision: Precision, schedule: Schedule, point: OperatingPoint
) -> Iterator[Operation]:
    """The products and attentions of a decoder."""
    dtype, caches = precision.activations, cache_layers(shape)
    for path, sizes in shape.linears().items():
        storage = scheduled_as(shape, precision, schedule, path)
        *stack, rows, columns = sizes
        product = storage.product(point.tokens, (rows, columns), dtype)
        used = math.prod(stack) * read_fraction(shape, path, 1)  # by each token
        stored = storage.bits(sizes) / 8
        read = stored * read_fraction(shape, path, point.tokens)
        flops = 2.0 * point.tokens * used * storage.stored_rows(rows) * columns
        yield Operation(used, stored, read, flops, product)
    for index, layer in enumerate(shape.layers):
        attention = layer.attention
        if attention is None:
            continue
        cache, over = cached_as(precision, schedule, caches[index]), None
        tensors, reads = (each(point.batch, point.context) for each in (attention.cache, attention.reads))
        stored, read = (
            sum(cached_bytes(cache.format, dtype, one) for one in each.values()) for each in (tensors, reads)
        )
        states = attention.states(point.batch, point.context).values()
        state_bytes = STATE_BYTES * sum(math.prod(state) for state in states)
        flops = 2.0 * point.batch * attention.multiplications(point.tokens // point.batch, point.context)
        if isinstance(attention, SoftmaxShape):
            over = attention.over(cache, point.batch, reads["key"][1])
        yield Operation(1, stored + state_bytes, read + state_bytes, flops, None, over)


def cache_layers(shape: DecoderShape) -> list[int]:
    """For each layer, the one whose cache it attends to: its own, or where it has none the nearest below that has."""
    found: list[int] = []
    for index, layer in enumerate(shape.layers):
        has = layer.attention is not None and layer.attention.cache(1, 1)
        found.append(index if has or not found else found[-1])
    return found


def product_by(role: Role, schedule: Schedule, product: Product) -> str:
    """What runs a product: the kernel that the schedule names, or the lowering in its place."""
    if role == "absorbed":  # XLA multiplies it in the lowering of attention
        return "dot" if schedule.attention in ATTENTION_KERNELS else schedule.attention
    if schedule.matmul in MATMUL_KERNELS and MATMUL_KERNELS[schedule.matmul].why_not(product) is not None:
        return "dot"
    return schedule.matmul


def attention_by(attention: AttentionShape, over: CachedAttention | None, schedule: Schedule, phase: Phase) -> str:
    """What runs an attention: the kernel that the schedule names, or the lowering in its place."""
    if schedule.attention not in ATTENTION_KERNELS:
        return schedule.attention
    whole = isinstance(attention, SoftmaxShape) and attention.blocks is None and not attention.borrows
    if over is None or not whole or phase != "decode":
        return "dot"
    return "dot" if ATTENTION_KERNELS[schedule.attention].why_not(over) else schedule.attention


def role_of(path: str, sizes: Sequence[int]) -> Role:
    """What the matrix at `path` is for."""
    if path == EMBEDDING:
        return "embedding"
    if path.endswith(DECIDES):
        return "small"
    if path.endswith(ABSORBED):
        return "absorbed"
    return "expert" if len(sizes) > 2 else "matrix"


STATE_BYTES = 4.0
"""States are kept in float32 (`architecture/cache.py`)."""


def read_fraction(shape: DecoderShape, path: str, tokens: int) -> float:
    """Which part of a stack of matrices so many tokens read; 1 of a single one."""
    _, _, inner = path.partition(".")
    index, _, name = inner.partition(".")
    block, _, name = name.partition(".")
    if block != "feedforward":
        return 1.0
    feedforward = shape.layers[int(index)].feedforward
    assert feedforward is not None
    return feedforward.read_fraction(name, tokens)


@functools.cache
def cached_bytes(name: str, dtype: str, tensor: tuple[int, int, int, int]) -> int:
    """The bytes of a cached tensor [B, S, K, D] in a format."""
    arrays = KVCache(name, dtype=dtype).spec({"tensor": tensor}, {})["tensor"].values()
    return sum(array.size * array.dtype.itemsize for array in arrays)
