"""Timing one operation on the device at hand, as one of many in a program, on cold data.

To time a new kind, register how it is made: a function of an input and an operand, and both.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosearch.core.errors import Rejected, first_line
from cosearch.kernels import MATMUL_KERNELS, Product
from cosearch.measure import timing
from cosearch.measure.verify_kernel import storage_of
from cosearch.schedule.matmul import MATMULS

_MOST_COPIES, _LEAST_COPIES = 64, 8
"""Operations in a program: the least, so that calling it costs little beside them."""
_SAMPLE_S, _MOST_CALLS = 5e-3, 16
"""An accelerator's sample is of as many calls as take that long: while it works on one, the next is made."""
_MOST_ROUNDS = 1000

Operand = Any
Operation = Callable[[jax.Array, Operand], jax.Array]
Made = tuple[jax.Array, Operand, Operation]
"""An input, an operand, and the operation on both."""


def time_operation(
    kind: str, columns: Mapping[str, Any], cold_bytes: int, seconds: float, canary: timing.Canary | None
) -> timing.Timed:
    """Seconds of an operation in about so many `seconds`; operands are as many copies as are `cold_bytes` together.

    Raises:
        Rejected: this device, or its compiler, does not do it.
    """
    if kind not in MAKERS:
        raise Rejected(f"operations of the kind {kind!r} are not timed; those that are: {', '.join(MAKERS)}")
    try:
        x, operand, run = MAKERS[kind](**columns)
        size = sum(part.nbytes for part in jax.tree.leaves(operand))
        count = int(np.clip(-(-cold_bytes // max(size, 1)), _LEAST_COPIES, _MOST_COPIES))
        copies = [jax.tree.map(jnp.copy, operand) for _ in range(count)]
        timer = _time_linked if jax.devices()[0].platform == "cpu" else _time_in_turn
        timed = timer(run, x, copies, seconds, canary)
    except (jax.errors.JaxRuntimeError, NotImplementedError, TypeError) as error:
        raise Rejected(f"{kind} {dict(columns)}: {first_line(error)[:300]}") from None
    return timing.Timed([[sample / count for sample in timed.sides[0]]], timed.contended)


def in_turn(run: Operation) -> Callable[[Sequence[jax.Array], Sequence[Operand]], list[jax.Array]]:
    """A program of an operation on each pair of inputs and operands, and of nothing else: XLA can merge no two and
    leave none out, and no kernel is needed to make one wait for another, since an accelerator runs one at a time."""

    def program(inputs: Sequence[jax.Array], operands: Sequence[Operand]) -> list[jax.Array]:
        return [jax.lax.optimization_barrier(run(x, one)) for x, one in zip(inputs, operands, strict=True)]

    return program


def linked(run: Operation) -> Callable[[jax.Array, Sequence[Operand]], tuple[jax.Array, list[jax.Array]]]:
    """A program of an operation on each operand, each of which waits for the last one: between them, an element is
    copied. A processor would run several at once, as it does not where layers follow each other."""

    def program(x: jax.Array, operands: Sequence[Operand]) -> tuple[jax.Array, list[jax.Array]]:
        outs = []
        for one in operands:
            outs.append(jax.lax.optimization_barrier(run(x, one)))
            x = jax.lax.optimization_barrier(_link(x, outs[-1]))
        return x, outs  # so that all of each is computed

    return program


def links(x: jax.Array, outs: Sequence[jax.Array]) -> jax.Array:
    """What a program that is `linked` does beside its operations."""
    for out in outs:
        x = jax.lax.optimization_barrier(_link(x, out))
    return x


def _link(x: jax.Array, out: jax.Array) -> jax.Array:
    return x.at[(0,) * x.ndim].set(out[(0,) * out.ndim].astype(x.dtype))


def _time_in_turn(
    run: Operation, x: jax.Array, copies: Sequence[Operand], seconds: float, canary: timing.Canary | None
) -> timing.Timed:
    inputs = [jnp.copy(x) for _ in copies]
    compiled = jax.jit(in_turn(run)).lower(inputs, copies).compile()
    jax.block_until_ready(compiled(inputs, copies))
    start = time.perf_counter()
    jax.block_until_ready(compiled(inputs, copies))
    calls = min(math.ceil(_SAMPLE_S / (time.perf_counter() - start)), _MOST_CALLS)

    def several() -> None:
        out = None
        for _ in range(calls):
            out = compiled(inputs, copies)
        jax.block_until_ready(out)

    timed = timing.sample(several, seconds, canary)
    return timing.Timed([[sample / calls for sample in timed.sides[0]]], timed.contended)


def _time_linked(
    run: Operation, x: jax.Array, copies: Sequence[Operand], seconds: float, canary: timing.Canary | None
) -> timing.Timed:
    """What linking costs is timed beside it, and subtracted."""
    whole = jax.jit(linked(run)).lower(x, copies).compile()
    _, outs = whole(x, copies)
    beside = jax.jit(links).lower(x, outs).compile()
    runs = [lambda: jax.block_until_ready(whole(x, copies)), lambda: jax.block_until_ready(beside(x, outs))]
    timed = timing.side_by_side(runs, _MOST_ROUNDS, canary=canary, seconds=seconds)
    both, links_s = timed.sides[0], float(np.median(timed.sides[1]))
    if np.median(both) <= links_s:
        raise Rejected("impossible: it takes no time that could be told from that of copying an element")
    return timing.Timed([[sample - links_s for sample in both if sample > links_s]], timed.contended)


_XLA_DTYPES = {"bfloat16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn}


def _drawn(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)


def _gemm(dtype: str, m: int, n: int, k: int) -> Made:
    """`x` [m, k] of bfloat16 times [n, k]; for fp8, `x` is rounded to it first, as where it serves."""
    narrow = _XLA_DTYPES[dtype]

    def run(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            x.astype(narrow), weights, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16
        )

    return _drawn((m, k), jnp.bfloat16), _drawn((n, k), narrow), run


def _attend(query_tokens: Callable[[int], int], causal: bool) -> Callable[..., Made]:
    def make(batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int) -> Made:
        query = _drawn((batch, query_tokens(tokens), heads, head_dim), jnp.bfloat16)
        keys = _drawn((2, batch, tokens, kv_heads, head_dim), jnp.bfloat16)

        def run(query: jax.Array, keys: jax.Array) -> jax.Array:
            return jax.nn.dot_product_attention(query, keys[0], keys[1], is_causal=causal)

        return query, keys, run

    return make


def _product(tokens: int, rows: int, columns: int, stored: str, by: str, layout: str, dtype: str = "float32") -> Made:
    """A product with a matrix `stored` in one of cosearch's formats, by a lowering of XLA's or a kernel."""
    product = Product(tokens, rows, columns, stored, layout, dtype=dtype)
    if by not in MATMULS and (why := MATMUL_KERNELS[by].why_not(product)):
        raise Rejected(f"the kernel {by!r} does not do this product: {why}")
    weights = np.random.default_rng(0).standard_normal((rows, columns), np.float32) * 0.02
    operand = {part: jnp.asarray(array) for part, array in storage_of(product).pack(weights).items()}
    lowered = storage_of(product, by)
    return _drawn((tokens, rows), dtype), operand, lambda x, one: lowered.multiply(x, one, (rows, columns))


MAKERS: Mapping[str, Callable[..., Made]] = {
    "gemm": _gemm,
    "attn_context": _attend(lambda tokens: tokens, causal=True),
    "attn_generation": _attend(lambda tokens: 1, causal=False),
    "product": _product,
}
