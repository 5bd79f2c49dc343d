"""Attention by tokamax (https://github.com/openxla/tokamax), which chooses among its kernels and XLA's own.

It is no dependency of this project: `pip install tokamax`, of at least 0.0.17, makes it available.
"""

import importlib
from dataclasses import dataclass
from importlib.util import find_spec

import jax
import jax.numpy as jnp

from cosearch.kernels import ATTENTION_KERNELS, CachedAttention, Stored
from cosearch.kernels.dot_product_attention import logical


@dataclass(frozen=True)
class Tokamax:
    """`tokamax.dot_product_attention`."""

    platforms = frozenset({"cpu", "gpu", "tpu"})

    def why_unavailable(self) -> str | None:
        return None if find_spec("tokamax") else "tokamax is not installed"

    def why_not(self, attention: CachedAttention) -> str | None:
        return None

    def __call__(
        self, query_BHD: jax.Array, key: Stored, value: Stored, length: jax.Array, attention: CachedAttention
    ) -> jax.Array:
        tokamax = importlib.import_module("tokamax")
        lengths = jnp.full((attention.batch,), length, jnp.int32)
        key_BSKD, value_BSKD = logical(key, attention), logical(value, attention)
        out = tokamax.dot_product_attention(query_BHD[:, None], key_BSKD, value_BSKD, key_value_seq_lengths=lengths)
        return out[:, 0]


ATTENTION_KERNELS.register("tokamax")(Tokamax())
