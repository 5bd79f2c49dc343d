"""Softmax attention with RoPE, which `mha`, `gqa`, `mqa` and `sliding_window` are shapes of.

Shape suffixes: B batch, T tokens, W width, H query heads, K key/value heads, G = H / K queries sharing one
key/value head, D head size, S cache slots.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosearch.architecture.cache import KVCache
from cosearch.core.candidate import Value
from cosearch.core.errors import Rejected
from cosearch.core.space import Knob, choice, integer
from cosearch.schedule.matmul import multiply_reduce

QK_NORM: Mapping[str, Knob] = {"qk_norm": choice(True, lambda: (True, False), per_layer=True)}
"""The knob of all softmax variants: RMS-normalised queries and keys (Dehghani et al. 2023, arXiv:2302.05442)."""

KV_HEADS: Mapping[str, Knob] = {"kv_heads": integer(1, per_layer=True)}
"""The knob of the variants whose key/value heads are fewer than their query heads."""

_SHARPNESS = 2.0
"""What a query's norm starts at: attention that starts sharper learns to look things up in fewer steps."""


@dataclass(frozen=True)
class SoftmaxShape:
    """`window` is how many tokens, itself included, a token sees; None for all."""

    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool = True
    window: int | None = None

    @classmethod
    def of(
        cls, width: int, choices: Mapping[str, Value], kv_heads: Value | None = None, window: Value | None = None
    ) -> "SoftmaxShape":
        """Heads that together are as wide as the model; each with its own key/value head unless told otherwise."""
        head_dim = choices["head_dim"]
        assert isinstance(head_dim, int) and isinstance(kv_heads, int | None) and isinstance(window, int | None)
        if width % head_dim:
            raise Rejected(f"heads of {head_dim} do not divide a width of {width}")
        heads = width // head_dim
        return cls(heads, kv_heads or heads, head_dim, bool(choices["qk_norm"]), window)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise Rejected(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise Rejected(f"RoPE turns pairs, so head_dim must be even, not {self.head_dim}")

    def linears(self, width: int) -> Mapping[str, tuple[int, int]]:
        return {
            "query": (width, self.heads * self.head_dim),
            "key": (width, self.kv_heads * self.head_dim),
            "value": (width, self.kv_heads * self.head_dim),
            "output": (self.heads * self.head_dim, width),
        }

    def norms(self) -> Mapping[str, tuple[int, float]]:
        return {"query_norm": (self.head_dim, _SHARPNESS), "key_norm": (self.head_dim, 1.0)} if self.qk_norm else {}

    def cache(self, batch: int, capacity: int) -> Mapping[str, tuple[int, int, int, int]]:
        slots = min(self.window or capacity, capacity)
        tensor = (batch, slots, self.kv_heads, self.head_dim)
        return {"key": tensor, "value": tensor}

    def with_heads(self, heads: int, kv_heads: int) -> "SoftmaxShape":
        return replace(self, heads=heads, kv_heads=kv_heads)

    def build(self, modules: Mapping[str, nnx.Module], cache: KVCache) -> nnx.Module:
        return SoftmaxAttention(self, modules, cache)


class SoftmaxAttention(nnx.Module):
    """Causal softmax attention over a ring of cache slots: position p lives in slot p mod S."""

    def __init__(self, shape: SoftmaxShape, modules: Mapping[str, nnx.Module], cache: KVCache) -> None:
        self.shape = shape
        self.parts = nnx.Dict(modules)
        self.cache = cache

    def score(self, x_BTW: jax.Array) -> jax.Array:
        positions = jnp.arange(x_BTW.shape[1])
        query, key, value = self._project(x_BTW, positions)
        key, value = self.cache.round_trip(key), self.cache.round_trip(value)
        mask = self._visible(positions[:, None], positions[None, :])
        return self._output(_attend(query, key, value, mask, "dot"))

    def prefill(self, x_BTW: jax.Array, cache: dict, start: jax.Array, length: jax.Array) -> tuple[jax.Array, dict]:
        tokens, slots = x_BTW.shape[1], self.cache.slots(cache, "key")
        positions = start + jnp.arange(tokens)
        query, key, value = self._project(x_BTW, positions)
        # The chunk is attended to beside the cache and written afterwards: in a ring, writing first would
        # overwrite tokens that the chunk's own first tokens still see.
        slot_positions = _newest_in_slot(jnp.arange(slots), start - 1, slots)
        key_positions = jnp.concatenate([slot_positions, positions])
        mask = self._visible(positions[:, None], key_positions[None, :]) & (key_positions >= 0)
        keys = jnp.concatenate([self.cache.load(cache, "key"), self.cache.round_trip(key)], axis=1)
        values = jnp.concatenate([self.cache.load(cache, "value"), self.cache.round_trip(value)], axis=1)
        out = self._output(_attend(query, keys, values, mask, "dot"))
        # Of tokens that fall on the same slot only the newest is kept; padding is not written at all.
        offsets = jnp.arange(tokens)
        kept = (offsets < length) & (offsets >= length - slots)
        targets = jnp.where(kept, positions % slots, slots)
        cache = self.cache.write(cache, {"key": key, "value": value}, targets)
        return out, cache

    def decode_step(self, x_B1W: jax.Array, cache: dict, position: jax.Array) -> tuple[jax.Array, dict]:
        slots = self.cache.slots(cache, "key")
        query, key, value = self._project(x_B1W, position[None])
        cache = self.cache.append(cache, {"key": key, "value": value}, position % slots)
        mask = _newest_in_slot(jnp.arange(slots), position, slots)[None, :] >= 0
        lowering = self.cache.lowering
        out = _attend(query, self.cache.load(cache, "key"), self.cache.load(cache, "value"), mask, lowering)
        return self._output(out), cache

    def _project(self, x_BTW: jax.Array, positions_T: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        batch, tokens, _ = x_BTW.shape
        query, key, value = (
            self.parts[name](x_BTW).reshape(batch, tokens, heads, self.shape.head_dim)
            for name, heads in (
                ("query", self.shape.heads),
                ("key", self.shape.kv_heads),
                ("value", self.shape.kv_heads),
            )
        )
        if self.shape.qk_norm:
            query, key = self.parts["query_norm"](query), self.parts["key_norm"](key)
        return rotate(query, positions_T), rotate(key, positions_T), value

    def _visible(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        distance = query_positions - key_positions
        seen = distance >= 0
        return seen if self.shape.window is None else seen & (distance < self.shape.window)

    def _output(self, out_BTHD: jax.Array) -> jax.Array:
        return self.parts["output"](out_BTHD.reshape(*out_BTHD.shape[:2], -1))


def rotate(x_BTHD: jax.Array, positions_T: jax.Array, theta: float = 10_000.0) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), the first half of D paired with the second."""
    half = x_BTHD.shape[-1] // 2
    dtype = jnp.promote_types(x_BTHD.dtype, jnp.float32)
    frequency = np.asarray(theta ** (-np.arange(half) / half), dtype)
    angle = positions_T.astype(dtype)[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BTHD.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BTHD.dtype)


def _newest_in_slot(slot: jax.Array, newest: jax.Array, slots: int) -> jax.Array:
    """The position a slot holds once position `newest` is written; negative where nothing is."""
    return newest - (newest - slot) % slots


def _attend(
    query_BTHD: jax.Array, key_BSKD: jax.Array, value_BSKD: jax.Array, mask_TS: jax.Array, lowering: str
) -> jax.Array:
    """Grouped softmax attention; the softmax runs in at least float32."""
    batch, tokens, heads, head_dim = query_BTHD.shape
    kv_heads = key_BSKD.shape[2]
    query = query_BTHD.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query = query * np.asarray(head_dim**-0.5, query.dtype)
    if lowering == "multiply_reduce":
        scores = multiply_reduce("btkgd,bskd->btkgs", query, key_BSKD)
    else:
        scores = jnp.einsum("btkgd,bskd->btkgs", query, key_BSKD, preferred_element_type=dtype)
    scores = jnp.where(mask_TS[None, :, None, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    if lowering == "multiply_reduce":
        out = multiply_reduce("btkgs,bskd->btkgd", weights, value_BSKD)
    else:
        out = jnp.einsum(
            "btkgs,bskd->btkgd", weights.astype(value_BSKD.dtype), value_BSKD, preferred_element_type=dtype
        )
    return out.reshape(batch, tokens, heads, head_dim).astype(query_BTHD.dtype)
