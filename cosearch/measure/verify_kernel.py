"""Does a kernel compute what its reference does? Compared with float64 on what kernels get wrong.

Inputs are drawn anew from several distributions; errors are relative to the sum of magnitudes that a result is made of,
and judged by those of the plain reference in the same formats: twice their root mean square, four times their largest,
and a floor for other orders of float32 sums. Each call gets an output buffer that is filled with something else, inputs
must be left as they were, and every call is repeated between calls with other inputs and must give the same bits.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosearch.architecture.attention.softmax import attend
from cosearch.architecture.cache import KVCache, zeros
from cosearch.architecture.linear import MatrixStorage
from cosearch.core.errors import Rejected
from cosearch.kernels import AttentionKernel, CachedAttention, MatmulKernel, Product
from cosearch.measure.verify import MOST_TYPICAL, MOST_WORST, digest, root_mean_square
from cosearch.precision.quantized import INPUTS

_REPEATS = 3
_FLOAT32_UNIT = 2.0**-24
_LARGEST_WEIGHT = 1e3
"""Of formats that hold no larger ones; inputs of products are of any size."""
_HUGE, _TINY = 1e15, 1e-15
_LEAST_WEIGHT = 2.0**-100
"""Of attention: what is smaller may be 0, or the least number that an exponential gives."""
_LEFT_BEHIND = 1e3
"""The size of keys and values in slots beyond the length. They are finite: 0 times them must be 0."""

Run = Callable[..., Any]
"""Called with an output buffer, which it may write to and return, and the inputs."""


@dataclass(frozen=True)
class Case:
    """Inputs, and what to expect of them: `exact` in float64, what the plain `reference` gave, and `size`, the sums of
    the magnitudes that each result is a sum of.

    `units` is by how many units of rounding of float32, of that size, an honest order of sums may be off.
    """

    name: str
    inputs: tuple[Any, ...]
    exact: np.ndarray
    reference: Any
    size: np.ndarray
    units: float


def verify(run: Run, cases: Sequence[Case], repeatable: bool = True) -> float:
    """The largest error of `run` over the cases, as a part of what is allowed.

    Raises:
        Rejected: a result is wrong, is not the same bit by bit when it is computed again though `repeatable`, or an
            input has changed.
    """
    before = [digest(case.inputs) for case in cases]
    outs = []
    for case in cases:
        poison = np.full(case.exact.shape, np.nan, case.reference.dtype)
        outs.append(np.array(run(poison, *case.inputs)))
    worst = max(_compare(case, out) for case, out in zip(cases, outs, strict=True))
    _check_unchanged(cases, before)
    for repeat in range(_REPEATS):
        for index in np.random.default_rng(repeat).permutation(len(cases)):
            case, other = cases[index], cases[index - 1]
            # What a result of other inputs may have left there.
            left = np.resize(np.asarray(other.reference), case.exact.shape).astype(case.reference.dtype)
            again = np.array(run(left, *case.inputs))
            if repeatable and again.tobytes() != outs[index].tobytes():
                raise Rejected(f"wrong result: {case.name}: it gives other bits when it is computed again")
            worst = max(worst, _compare(case, again))
    _check_unchanged(cases, before)
    return worst


def verify_matmul(kernel: MatmulKernel, product: Product, seed: int, repeatable: bool = True) -> float:
    """Verify `kernel` for one product, on inputs that `seed` draws; the error as a part of what is allowed.

    Raises:
        Rejected: it is wrong.
    """
    run = _donating(lambda x, stored: kernel(x, stored, product))
    return verify(run, list(matmul_cases(product, seed)), repeatable)


def verify_attention(kernel: AttentionKernel, attention: CachedAttention, seed: int, repeatable: bool = True) -> float:
    """Verify `kernel` for attention to one slot, to all and to all but one, on inputs that `seed` draws; the error as
    a part of what is allowed.

    Raises:
        Rejected: it is wrong.
    """
    run = _donating(lambda query, key, value, length: kernel(query, key, value, length, attention))
    return verify(run, list(attention_cases(attention, seed)), repeatable)


def _donating(kernel: Callable[..., jax.Array]) -> Run:
    """`kernel`, compiled so that its result is written where the buffer was."""
    compiled = jax.jit(lambda out, *inputs: kernel(*inputs), donate_argnums=0, keep_unused=True)

    def run(out: np.ndarray, *inputs: Any) -> jax.Array:
        made = jax.eval_shape(kernel, *inputs)
        if (made.shape, made.dtype) != (out.shape, out.dtype):
            raise Rejected(f"wrong result: {made.dtype}{list(made.shape)}, not {out.dtype}{list(out.shape)}")
        return compiled(jnp.array(out), *inputs)

    return run


def _check_unchanged(cases: Sequence[Case], before: Sequence[bytes]) -> None:
    for case, earlier in zip(cases, before, strict=True):
        if digest(case.inputs) != earlier:
            raise Rejected(f"wrong result: {case.name}: it overwrites its inputs")


def _compare(case: Case, out: np.ndarray) -> float:
    if (out.shape, out.dtype) != (case.exact.shape, case.reference.dtype):
        wanted = f"{case.reference.dtype}{list(case.exact.shape)}"
        raise Rejected(f"wrong result: {case.name}: {out.dtype}{list(out.shape)}, not {wanted}")
    if not np.isfinite(out.astype(np.float64)).all():
        raise Rejected(f"wrong result: {case.name}: a value is not finite")
    own, errors = (_relative(np.asarray(found), case) for found in (case.reference, out))
    unit = float(jnp.finfo(out.dtype).eps) / 2
    floor = case.units * _FLOAT32_UNIT + (unit if unit > _FLOAT32_UNIT else 0.0)
    typical, typical_allowed = root_mean_square(errors), MOST_TYPICAL * root_mean_square(own) + floor
    worst, worst_allowed = float(errors.max()), MOST_WORST * float(own.max()) + 2 * floor
    ratio = max(typical / typical_allowed, worst / worst_allowed)
    if ratio > 1:
        raise Rejected(
            f"wrong result: {case.name}: {typical:.2e} from float64, and {worst:.2e} at the worst; the formats allow "
            f"{typical_allowed:.2e} and {worst_allowed:.2e}"
        )
    return ratio


def _relative(out: np.ndarray, case: Case) -> np.ndarray:
    """Where nothing but zeros is summed, any error is as large as it is wrong."""
    off = np.abs(out.astype(np.float64) - case.exact)
    return np.where(case.size > 0, off / np.where(case.size > 0, case.size, 1), np.where(off > 0, np.inf, 0))


def matmul_cases(product: Product, seed: int) -> Iterator[Case]:
    """Inputs of a product: `x` and the packed matrix."""
    storage, rng = storage_of(product), np.random.default_rng(seed)
    plain = _plain_matmul(storage, (product.rows, product.columns))
    x_shape, w_shape = (product.tokens, product.rows), (product.rows, product.columns)
    # Rows of different sizes, so that a scale of the wrong group is far off.
    uneven = rng.standard_normal(w_shape) * 4.0 ** rng.uniform(-2, 2, (product.rows, 1))
    even = rng.standard_normal(w_shape)
    kept = rng.random(x_shape) < 0.3
    kept[rng.random(product.tokens) < 0.3] = False
    pairs = np.repeat(rng.standard_normal((product.tokens, -(-product.rows // 2))), 2, axis=1)[:, : product.rows]
    cancelling = pairs * np.where(np.arange(product.rows) % 2, -1, 1)
    drawn: Mapping[str, tuple[np.ndarray, np.ndarray]] = {
        "normal": (rng.standard_normal(x_shape), uneven),
        "heavy-tailed": (rng.standard_t(1.5, x_shape), rng.standard_t(1.5, w_shape)),
        "huge": (rng.standard_normal(x_shape) * _HUGE, even),
        "tiny": (rng.standard_normal(x_shape) * _TINY, even),
        "masked": (rng.standard_normal(x_shape) * kept, even),
        "constant": (
            np.broadcast_to(rng.uniform(0.5, 2, (product.tokens, 1)), x_shape),
            np.broadcast_to(rng.uniform(0.5, 2, (1, product.columns)), w_shape),
        ),
        "cancelling": (cancelling, 1 + 0.01 * even),
    }
    for name, (x, weights) in drawn.items():
        x = np.asarray(x, np.float32).astype(product.dtype)
        weights = np.clip(weights, -_LARGEST_WEIGHT, _LARGEST_WEIGHT).astype(np.float32)
        packed = storage.pack(weights)
        rounded, matrix = _rounded(x, product.inputs), storage.unpack(packed, w_shape)
        inputs = jnp.asarray(x), {part: jnp.asarray(array) for part, array in packed.items()}
        exact, size = rounded @ matrix, np.abs(rounded) @ np.abs(matrix)
        yield Case(f"{name} inputs", inputs, exact, np.array(plain(*inputs)), size, _units(name, product.rows))


def _rounded(x: np.ndarray, inputs: str) -> np.ndarray:
    """What a product's inputs are in float64 once they are rounded by token."""
    if inputs == "as_is":
        return x.astype(np.float64)
    token = jax.jit(INPUTS[inputs].encode)(jnp.asarray(x))
    return np.asarray(token["values"]).astype(np.float64) * np.asarray(token["scale"], np.float64)


def storage_of(product: Product, by: str = "dot") -> MatrixStorage:
    """How the matrix of a product is stored, and multiplied `by` a lowering of XLA's or a kernel."""
    return MatrixStorage(product.format, product.layout, by, product.inputs, product.compression)


@functools.cache
def _plain_matmul(storage: MatrixStorage, sizes: tuple[int, int]) -> Callable[..., jax.Array]:
    return jax.jit(lambda x, stored: storage.multiply(x, stored, sizes))


def attention_cases(attention: CachedAttention, seed: int) -> Iterator[Case]:
    """Inputs of attention: queries, packed keys and values, and the length."""
    slots, rng = attention.slots, np.random.default_rng(seed)
    query_shape = (attention.batch, attention.heads, attention.head_dim)
    shape = (attention.batch, slots, attention.kv_heads, attention.head_dim)
    for name, sharpness, draw in (
        ("normal", 1.0, rng.standard_normal),
        ("heavy-tailed", 1.0, functools.partial(rng.standard_t, 2.0)),
        ("sharp", 100.0, rng.standard_normal),
        ("flat", 1e-6, rng.standard_normal),
        ("constant", 1.0, lambda size: np.broadcast_to(rng.standard_normal((size[0], 1, *size[2:])), size)),
    ):
        for length in sorted({1, max(slots - 1, 1), slots}):
            query = (sharpness * draw(query_shape)).astype(np.float32).astype(attention.dtype)
            key, value = (np.where(_before(length, slots), draw(shape), _left(rng, shape)) for _ in range(2))
            yield _attention_case(attention, name, query, key, value, length)


def _units(name: str, terms: int) -> float:
    """Errors of sums one after the other grow with the root of the terms, and, of terms that are equal and so all are
    rounded to the same side, with the terms."""
    return 4 + (terms / 4 if name == "constant" else terms**0.5)


def _before(length: int, slots: int) -> np.ndarray:
    return (np.arange(slots) < length)[None, :, None, None]


def _left(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return _LEFT_BEHIND * rng.standard_normal(shape)


def _attention_case(
    attention: CachedAttention, name: str, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int
) -> Case:
    held = KVCache(attention.format, attention.layout, attention.dtype)
    cache = [_stored(held)(array.astype(np.float32).astype(attention.dtype)) for array in (key, value)]
    inputs = jnp.asarray(query), *cache, jnp.int32(length)
    with jax.enable_x64(True):
        keys, values = (np.asarray(_loaded(replace(held, dtype="float64"))(stored))[:, :length] for stored in cache)
    group = attention.heads // attention.kv_heads
    keys, values = (np.repeat(x, group, axis=2) for x in (keys, values))
    wide = query.astype(np.float64) * attention.head_dim**-0.5
    scores = np.einsum("bhd,bshd->bhs", wide, keys)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    exact = np.einsum("bhs,bshd->bhd", weights, values)
    size = np.einsum("bhs,bshd->bhd", np.maximum(weights, _LEAST_WEIGHT), np.abs(values))
    # An error of a score is one of its weight, relative to it.
    units = _units(name, length) * (1 + float(np.einsum("bhd,bshd->bhs", np.abs(wide), np.abs(keys)).max()))
    reference = np.array(_plain_attention(held)(*inputs))
    name = f"{name} inputs at length {length}"
    return Case(name, inputs, exact, reference, size, units)


@functools.cache
def _stored(held: KVCache) -> Callable[[Any], Any]:
    def store(x_BSKD: jax.Array) -> Any:
        batch, slots, heads, size = x_BSKD.shape
        cache = zeros(held.spec({"tensor": (batch, slots, heads, size)}, {}))
        return held.write(cache, {"tensor": x_BSKD}, jnp.arange(slots))["tensor"]

    return jax.jit(store)


@functools.cache
def _loaded(held: KVCache) -> Callable[[Any], jax.Array]:
    return jax.jit(lambda stored: held.load({"tensor": stored}, "tensor"))


@functools.cache
def _plain_attention(held: KVCache) -> Callable[..., jax.Array]:
    @jax.jit
    def plain(query_BHD: jax.Array, key: Any, value: Any, length: jax.Array) -> jax.Array:
        keys, values = (_loaded(held)(stored) for stored in (key, value))
        seen = jnp.arange(keys.shape[1])[None, :] < length
        return attend(query_BHD[:, None], keys, values, seen, "dot")[:, 0]

    return plain
