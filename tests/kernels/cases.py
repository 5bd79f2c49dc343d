"""Products and attentions with random operands, and their results in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosearch.architecture.cache import ORDERS
from cosearch.kernels import AttentionKernel, CachedAttention, MatmulKernel, Product
from cosearch.precision import FORMATS

FLOOR = {"float32": 1e-6, "bfloat16": 2e-3}


def product_operands(product: Product) -> tuple[jax.Array, dict[str, jax.Array]]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((product.tokens, product.rows)), product.dtype)
    weights = rng.standard_normal((product.rows, product.columns)).astype(np.float32)
    return x, jax.tree.map(jnp.asarray, FORMATS[product.format].pack(weights, product.layout))


def attention_operands(attention: CachedAttention) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """Queries, and keys and values in memory order."""
    rng = np.random.default_rng(0)
    shape = (attention.batch, attention.slots, attention.kv_heads, attention.head_dim)
    encode = FORMATS[attention.format].encode
    query = rng.standard_normal((attention.batch, attention.heads, attention.head_dim))
    key, value = (
        {
            part: array.transpose(ORDERS[attention.layout])
            for part, array in encode(jnp.asarray(rng.standard_normal(shape), "float32")).items()
        }
        for _ in "kv"
    )
    return jnp.asarray(query, attention.dtype), key, value


def check_product(kernel: MatmulKernel, product: Product) -> None:
    """The kernel's error is at most twice that of the lowering "dot", and a floor."""
    assert kernel.why_not(product) is None
    x, stored = product_operands(product)
    form = FORMATS[product.format]
    exact = np.asarray(x, np.float64) @ form.unpack(jax.tree.map(np.asarray, stored), product.layout)
    plain = form.matmul(x, stored, product.layout, "dot", product.inputs)
    out = jax.jit(lambda x, stored: kernel(x, stored, product))(x, stored)
    _compare(out, plain, exact, x)


def check_attention(kernel: AttentionKernel, attention: CachedAttention, length: int) -> None:
    """As `check_product`; the slots from `length` on hold what would be seen if they were read."""
    assert kernel.why_not(attention) is None
    query, key, value = attention_operands(attention)
    key, value = (_poison(tensor, attention, length) for tensor in (key, value))
    out = jax.jit(lambda q, k, v, length: kernel(q, k, v, length, attention))(query, key, value, jnp.int32(length))
    exact = _attend(query, key, value, length, attention, np.float64)
    plain = _attend(query, key, value, length, attention, query.dtype)
    _compare(out, plain, exact, query)


def _poison(tensor: Any, attention: CachedAttention, length: int) -> dict[str, jax.Array]:
    seen = (jnp.arange(attention.slots) < length).reshape(1, -1, 1, 1).transpose(ORDERS[attention.layout])
    return {part: jnp.where(seen, array, jnp.asarray(100, array.dtype)) for part, array in tensor.items()}


def _attend(query: jax.Array, key: Any, value: Any, length: int, attention: CachedAttention, dtype: Any) -> np.ndarray:
    """Attention with each step rounded to `dtype`."""
    key, value = (_decode(tensor, attention)[:, :length] for tensor in (key, value))
    grouped = np.asarray(query, np.float64).reshape(attention.batch, attention.kv_heads, -1, attention.head_dim)
    scores = np.einsum("bkgd,bskd->bkgs", grouped, key) * attention.head_dim**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True)).astype(dtype).astype(np.float64)
    out = np.einsum("bkgs,bskd->bkgd", weights, value).astype(dtype)
    return out.reshape(attention.batch, attention.heads, attention.head_dim)


def _decode(tensor: Any, attention: CachedAttention) -> np.ndarray:
    inverse = np.argsort(ORDERS[attention.layout])
    stored = {part: array.transpose(inverse) for part, array in tensor.items()}
    return np.asarray(FORMATS[attention.format].decode(stored, jnp.float32), np.float64)


def _compare(out: jax.Array, plain: Any, exact: np.ndarray, given: jax.Array) -> None:
    assert out.shape == exact.shape
    assert out.dtype == given.dtype
    assert _error(out, exact) <= 2 * _error(plain, exact) + FLOOR[given.dtype.name]


def _error(out: Any, exact: np.ndarray) -> float:
    """Of the norms; NaN counts as infinite."""
    error = float(np.linalg.norm(np.asarray(out, np.float64) - exact) / np.linalg.norm(exact))
    return error if np.isfinite(error) else float("inf")
