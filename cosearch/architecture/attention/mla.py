"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): the cache holds one latent of a token, from which every
head's key and value are made, and one rotary key that all heads share.

Queries are not compressed, as in DeepSeek-V2-Lite. Shape suffixes are those of `softmax.py`, with D the head size
without its rotary part, R the size of the rotary part, L that of the latent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosearch.architecture.attention import ATTENTION, Place
from cosearch.architecture.attention.softmax import attend, heads_of, rotate
from cosearch.architecture.cache import KVCache
from cosearch.architecture.linear import Linear
from cosearch.architecture.norm import rms_norm
from cosearch.core.candidate import Value
from cosearch.core.errors import Rejected
from cosearch.core.space import Knob, integer
from cosearch.schedule.matmul import multiply_reduce


@dataclass(frozen=True)
class LatentShape:
    """`heads` of `head_dim` beside `rope_dim` that are rotated; `latent` is the rank of all keys and values."""

    heads: int
    head_dim: int
    latent: int
    rope_dim: int

    def __post_init__(self) -> None:
        if self.rope_dim % 2:
            raise Rejected(f"RoPE turns pairs, so rope_dim must be even, not {self.rope_dim}")

    @property
    def reads_norm(self) -> tuple[str, ...]:
        return ("query", "latent", "rope_key")

    def linears(self, width: int) -> Mapping[str, tuple[int, ...]]:
        wide = self.heads * self.head_dim
        return {
            "query": (width, self.heads * (self.head_dim + self.rope_dim)),
            "latent": (width, self.latent),
            "rope_key": (width, self.rope_dim),
            "key_up": (self.latent, wide),
            "value_up": (self.latent, wide),
            "output": (wide, width),
        }

    def vectors(self) -> Mapping[str, np.ndarray]:
        # As in DeepSeek-V2, queries have no norm. One that starts at `softmax.SHARPNESS` is worse here: recall of 0.57
        # against 0.81 and 3.47 bits per byte against 3.32 (width 64, depth 2, 160 steps).
        return {"latent_norm": np.ones(self.latent, np.float32)}

    def cache(self, batch: int, capacity: int) -> Mapping[str, tuple[int, int, int, int]]:
        return {"latent": (batch, capacity, 1, self.latent), "rope_key": (batch, capacity, 1, self.rope_dim)}

    def states(self, batch: int, capacity: int) -> Mapping[str, tuple[int, ...]]:
        return {}

    def reads(self, batch: int, capacity: int) -> Mapping[str, tuple[int, int, int, int]]:
        return self.cache(batch, capacity)

    def multiplications(self, tokens: int, context: int) -> float:
        # A single token attends to latents, many to keys and values that are made of them.
        each = 2 * self.latent if tokens == 1 else 2 * self.head_dim
        return self.heads * (each + self.rope_dim) * float((np.arange(context - tokens, context) + 1).sum())

    def build(self, parts: Mapping[str, Any], cache: KVCache) -> "LatentAttention":
        return LatentAttention(self, parts, cache)


class LatentAttention(nnx.Module):
    """Causal attention of many heads over few cached numbers; the token at position p lives in slot p."""

    def __init__(self, shape: LatentShape, parts: Mapping[str, Any], cache: KVCache) -> None:
        self.shape = shape
        self.parts = nnx.Dict(parts)
        self.cache = cache

    def score(self, x_BTW: jax.Array, cache: None, shared: Any) -> tuple[jax.Array, None, Any]:
        positions = jnp.arange(x_BTW.shape[1])
        stored = {name: self.cache.round_trip(tensor) for name, tensor in self._compress(x_BTW, positions).items()}
        return self._expanded(x_BTW, positions, stored["latent"], stored["rope_key"]), cache, shared

    def prefill(
        self, x_BTW: jax.Array, cache: dict, shared: Any, start: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, dict, Any]:
        tokens = jnp.arange(x_BTW.shape[1])
        positions = start + tokens
        targets = jnp.where(tokens < length, positions, self.cache.slots(cache, "latent"))  # padding is not written
        cache = self.cache.write(cache, self._compress(x_BTW, positions), targets)
        latent, rope_key = self.cache.load(cache, "latent"), self.cache.load(cache, "rope_key")
        return self._expanded(x_BTW, positions, latent, rope_key), cache, shared

    def decode_step(
        self, x_B1W: jax.Array, cache: dict, shared: Any, position: jax.Array
    ) -> tuple[jax.Array, dict, Any]:
        """`key_up` is absorbed into the query and `value_up` into the output, so that the latents themselves are
        attended to, as one key/value head of all query heads; no key or value of a past token is ever made."""
        positions = position[None]
        cache = self.cache.append(cache, self._compress(x_B1W, positions), position)
        query, rope_query = self._query(x_B1W, positions)
        latent_query = self._absorb("bthd,lhd->bthl", query, "key_up")
        queries = jnp.concatenate([latent_query, rope_query], axis=-1)
        # `attend` takes the scale of the scores from the size it sees, which is not that of the heads.
        scale = (queries.shape[-1] / (self.shape.head_dim + self.shape.rope_dim)) ** 0.5
        latent, rope_key = self.cache.load(cache, "latent"), self.cache.load(cache, "rope_key")
        keys = jnp.concatenate([latent, rope_key], axis=-1)
        seen = jnp.arange(latent.shape[1])[None, :] <= position
        mixed = attend(queries * np.asarray(scale, queries.dtype), keys, latent, seen, self.cache.lowering)
        return self._output(self._absorb("bthl,lhd->bthd", mixed, "value_up")), cache, shared

    def _compress(self, x_BTW: jax.Array, positions_T: jax.Array) -> dict[str, jax.Array]:
        """What the cache holds of tokens: `latent` [B, T, 1, L] and `rope_key` [B, T, 1, R]."""
        latent = rms_norm(self.parts["latent"](x_BTW), self.parts["latent_norm"]())
        rope_key = rotate(self.parts["rope_key"](x_BTW)[:, :, None], positions_T)
        return {"latent": latent[:, :, None], "rope_key": rope_key}

    def _query(self, x_BTW: jax.Array, positions_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, H, D] and, rotated, [B, T, H, R]."""
        query, rope_query = jnp.split(self._heads(self.parts["query"](x_BTW)), [self.shape.head_dim], axis=-1)
        return query, rotate(rope_query, positions_T)

    def _expanded(
        self, x_BTW: jax.Array, positions_T: jax.Array, latent_BS1L: jax.Array, rope_key_BS1R: jax.Array
    ) -> jax.Array:
        """Attention with the keys and values of every head made from the latents, slot s being of position s: for many
        queries at once that is less work than to attend to the latents."""
        query = jnp.concatenate(self._query(x_BTW, positions_T), axis=-1)
        key, value = (self._heads(self.parts[name](latent_BS1L[:, :, 0])) for name in ("key_up", "value_up"))
        rope_key = jnp.broadcast_to(rope_key_BS1R, (*key.shape[:3], self.shape.rope_dim))
        seen = jnp.arange(key.shape[1])[None, :] <= positions_T[:, None]
        return self._output(attend(query, jnp.concatenate([key, rope_key], axis=-1), value, seen, "dot"))

    def _absorb(self, subscripts: str, x: jax.Array, name: str) -> jax.Array:
        """`x` times the matrix `name` [L, H, D] itself."""
        linear = self.parts[name]
        assert isinstance(linear, Linear)
        matrix_LHD = self._heads(linear.matrix(x.dtype))
        if self.cache.lowering == "multiply_reduce":
            return multiply_reduce(subscripts, x, matrix_LHD).astype(x.dtype)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum(subscripts, x, matrix_LHD, preferred_element_type=dtype).astype(x.dtype)

    def _heads(self, x: jax.Array) -> jax.Array:
        """[..., H * n] to [..., H, n]."""
        return x.reshape(*x.shape[:-1], self.shape.heads, -1)

    def _output(self, out_BTHD: jax.Array) -> jax.Array:
        return self.parts["output"](out_BTHD.reshape(*out_BTHD.shape[:2], -1))


class Latent:
    knobs: Mapping[str, Knob] = {"latent": integer(64, per_layer=True), "rope_dim": integer(16, per_layer=True)}

    def shape(self, place: Place, choices: Mapping[str, Value]) -> LatentShape:
        latent, rope_dim = choices["latent"], choices["rope_dim"]
        assert isinstance(latent, int) and isinstance(rope_dim, int)
        return LatentShape(*heads_of(place.width, choices), latent, rope_dim)


ATTENTION.register("mla")(Latent())
