"""Timing one operation on the device at hand, as one of many in a program, on cold data.

To time a new kind, register how it is made: a function of one operand that is read anew each time, and the operand.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosearch.core.errors import Rejected
from cosearch.kernels import MATMUL_KERNELS, Product
from cosearch.measure import timing
from cosearch.measure.verify_kernel import storage_of
from cosearch.schedule.matmul import MATMULS

_MOST_COPIES, _LEAST_COPIES = 64, 8
"""Operations in a program: the least, so that calling it costs little beside them."""

Operand = Any
Made = tuple[jax.Array, Operand, Callable[[jax.Array, Operand], jax.Array]]
"""An input, an operand, and the operation on both; its output's sum changes the next one's input."""


def time_operation(
    kind: str, columns: Mapping[str, Any], cold_bytes: int, seconds: float, canary: timing.Canary | None
) -> timing.Timed:
    """Seconds of an operation in about so many `seconds`; operands are as many copies as are `cold_bytes` together.

    Raises:
        Rejected: this device, or its compiler, does not do it.
    """
    if kind not in MAKERS:
        raise Rejected(f"operations of the kind {kind!r} are not timed; those that are: {', '.join(MAKERS)}")
    x, operand, run = MAKERS[kind](**columns)
    size = sum(part.nbytes for part in jax.tree.leaves(operand))
    count = int(np.clip(-(-cold_bytes // max(size, 1)), _LEAST_COPIES, _MOST_COPIES))
    copies = [jax.tree.map(jnp.copy, operand) for _ in range(count)]

    def program(x: jax.Array, copies: list[Operand]) -> jax.Array:
        for one in copies:
            out = run(x, one)
            x = x + (1e-30 * jnp.max(out)).astype(x.dtype)  # the next one cannot begin before
        return x

    try:
        compiled = jax.jit(program).lower(x, copies).compile()
        jax.block_until_ready(compiled(x, copies))
    except (jax.errors.JaxRuntimeError, NotImplementedError, TypeError) as error:
        raise Rejected(f"{kind} {dict(columns)}: {str(error).splitlines()[0][:300]}") from None
    timed = timing.sample(lambda: jax.block_until_ready(compiled(x, copies)), seconds, canary)
    return timing.Timed([[sample / count for sample in side] for side in timed.sides], timed.contended)


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
