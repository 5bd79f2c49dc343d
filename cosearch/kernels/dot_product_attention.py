"""Attention by `jax.nn.dot_product_attention`: XLA's own as "dot_product_attention", NVIDIA's library as "cudnn"."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import jax
import jax.numpy as jnp

from cosearch.architecture.cache import KVCache
from cosearch.kernels import ATTENTION_KERNELS, CachedAttention, Stored


def logical(stored: Stored, attention: CachedAttention) -> jax.Array:
    """Keys or values [batch, slots, kv_heads, head_dim] in the dtype of the attention."""
    return KVCache(attention.format, attention.layout, attention.dtype).load({"tensor": stored}, "tensor")


@dataclass(frozen=True)
class DotProductAttention:
    """`jax.nn.dot_product_attention` by one of its implementations."""

    implementation: Literal["xla", "cudnn"]
    platforms: frozenset[str]

    def why_unavailable(self) -> str | None:
        if self.implementation == "cudnn" and not any(find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
            return "JAX's plugin for CUDA, which brings cuDNN, is not installed"
        return None

    def why_not(self, attention: CachedAttention) -> str | None:
        if self.implementation == "xla":
            return None
        if (attention.format, attention.dtype) != ("bfloat16", "bfloat16"):
            return f"cuDNN is given bfloat16 and no {attention.format} cache with {attention.dtype} queries"
        if attention.layout != "bshd":
            return f"cuDNN is given caches in bshd; all of one in {attention.layout} would be copied for it"
        if attention.head_dim % 8 or attention.head_dim > 128:
            return f"heads are multiples of 8 up to 128 wide, not {attention.head_dim}"
        return None

    def __call__(
        self, query_BHD: jax.Array, key: Stored, value: Stored, length: jax.Array, attention: CachedAttention
    ) -> jax.Array:
        lengths = jnp.full((attention.batch,), length, jnp.int32)
        key_BSKD, value_BSKD = logical(key, attention), logical(value, attention)
        return jax.nn.dot_product_attention(
            query_BHD[:, None],
            key_BSKD,
            value_BSKD,
            query_seq_lengths=jnp.ones_like(lengths),
            key_value_seq_lengths=lengths,
            implementation=self.implementation,
        )[:, 0]


ATTENTION_KERNELS.register("dot_product_attention")(DotProductAttention("xla", frozenset({"cpu", "gpu", "tpu"})))
ATTENTION_KERNELS.register("cudnn")(DotProductAttention("cudnn", frozenset({"gpu"})))
