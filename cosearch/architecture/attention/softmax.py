"""Softmax attention with RoPE, which `mha`, `gqa`, `mqa`, `sliding_window`, `local_global` and `cross_layer` are
shapes of.

Shape suffixes: B batch, T tokens, W width, H query heads, K key/value heads, G = H / K queries sharing one
key/value head, D head size, S cache slots, N blocks of slots.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosearch.architecture.attention import Place
from cosearch.architecture.cache import KVCache
from cosearch.architecture.norm import rms_norm
from cosearch.core.candidate import Value
from cosearch.core.errors import Rejected
from cosearch.core.space import Knob, choice, integer, whole_part
from cosearch.kernels import ATTENTION_KERNELS, CachedAttention
from cosearch.schedule.matmul import multiply_reduce

QK_NORM: Mapping[str, Knob] = {"qk_norm": choice(True, lambda: (True, False), per_layer=True)}
"""The knob of all softmax variants: RMS-normalised queries and keys (Dehghani et al. 2023, arXiv:2302.05442)."""

KV_HEADS: Mapping[str, Knob] = {"kv_heads": integer(1, per_layer=True)}
"""The knob of the variants whose key/value heads are fewer than their query heads."""

WINDOW: Mapping[str, Knob] = {
    "window": integer(128, per_layer=True),
    "sinks": integer(0, at_least=0, per_layer=True),
}
"""The knobs of windows: how many tokens, itself included, a token sees, and how many of the first it sees besides
(attention sinks, Xiao et al. 2023, arXiv:2309.17453)."""

_THETA = 10_000.0
"""The base of rotary frequencies."""

SHARPNESS = 2.0
"""What a query's norm starts at: attention that starts sharper learns to look things up in fewer steps."""


@dataclass(frozen=True)
class BlockTopK:
    """Attention to few blocks of `size` keys: the `kept` that score best, and the block of the query itself."""

    size: int
    kept: int


@dataclass(frozen=True)
class SoftmaxShape:
    """`window` is how many tokens, itself included, a token sees, beside the first `sinks`; None for all.

    A `borrows` layer has no keys and values of its own and attends to those of the layer below. `blocks` is chosen by
    the sparsity axis.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool = True
    window: int | None = None
    sinks: int = 0
    borrows: bool = False
    blocks: BlockTopK | None = None

    @classmethod
    def of(
        cls, place: Place, choices: Mapping[str, Value], kv_heads: Value | None = None, windowed: bool = False
    ) -> "SoftmaxShape":
        """`heads` of `head_dim`, each with its own key/value head unless told otherwise."""
        heads, head_dim = heads_of(place.width, choices)
        window, sinks = (choices["window"], choices["sinks"]) if windowed else (None, 0)
        assert isinstance(kv_heads, int | None) and isinstance(window, int | None) and isinstance(sinks, int)
        return cls(heads, kv_heads or heads, head_dim, bool(choices["qk_norm"]), window, sinks)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise Rejected(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise Rejected(f"RoPE turns pairs, so head_dim must be even, not {self.head_dim}")

    @property
    def reads_norm(self) -> tuple[str, ...]:
        return ("query",) if self.borrows else ("query", "key", "value")

    def linears(self, width: int) -> Mapping[str, tuple[int, ...]]:
        query = {"query": (width, self.heads * self.head_dim)}
        own = dict.fromkeys(("key", "value"), (width, self.kv_heads * self.head_dim))
        output = {"output": (self.heads * self.head_dim, width)}
        return query | ({} if self.borrows else own) | output

    def vectors(self) -> Mapping[str, np.ndarray]:
        if not self.qk_norm:
            return {}
        query = {"query_norm": np.full(self.head_dim, SHARPNESS, np.float32)}
        return query | ({} if self.borrows else {"key_norm": np.ones(self.head_dim, np.float32)})

    def cache(self, batch: int, capacity: int) -> Mapping[str, tuple[int, int, int, int]]:
        if self.borrows:
            return {}
        tensor = (batch, self._slots(capacity), self.kv_heads, self.head_dim)
        return {"key": tensor, "value": tensor}

    def states(self, batch: int, capacity: int) -> Mapping[str, tuple[int, ...]]:
        if self.blocks is None:
            return {}
        return {"key_sum": (batch, -(-capacity // self.blocks.size), self.kv_heads, self.head_dim)}

    def reads(self, batch: int, capacity: int) -> Mapping[str, tuple[int, int, int, int]]:
        slots = self._slots(capacity)
        if self.blocks is not None:
            slots = min(self.blocks.size * (self.blocks.kept + 1), capacity)
        return dict.fromkeys(("key", "value"), (batch, slots, self.kv_heads, self.head_dim))

    def multiplications(self, tokens: int, context: int) -> float:
        products = 2 * self.heads * self.head_dim  # of a query with a key, and of its weight with a value
        if self.blocks is None:
            seen = np.minimum(np.arange(context - tokens, context) + 1, self._slots(context))
            return products * float(seen.sum())
        sums = tokens * self.kv_heads * self.head_dim * -(-context // self.blocks.size)
        if tokens > 1:  # under a mask, of all that came before
            return sums + products * float((np.arange(context - tokens, context) + 1).sum())
        return sums + products * self.reads(1, context)["key"][1]

    def over(self, cache: KVCache, batch: int, slots: int) -> CachedAttention:
        """What a kernel is asked for in a decode step."""
        sizes = (batch, self.heads, self.kv_heads, self.head_dim, slots)
        return CachedAttention(*sizes, cache.format, cache.layout, cache.dtype)

    def build(self, parts: Mapping[str, Any], cache: KVCache) -> "SoftmaxAttention":
        return SoftmaxAttention(self, parts, cache)

    def _slots(self, capacity: int) -> int:
        return capacity if self.window is None else min(self.sinks + self.window, capacity)


def heads_of(width: int, choices: Mapping[str, Value]) -> tuple[int, int]:
    """How many heads there are, and their size: together they are `heads_ratio` times as wide as the model."""
    head_dim, ratio = choices["head_dim"], choices["heads_ratio"]
    assert isinstance(head_dim, int) and isinstance(ratio, int | float)
    heads = whole_part(width / head_dim, ratio)
    if heads is None:
        part = "" if ratio == 1 else f"{ratio:g} of "
        raise Rejected(f"heads of {head_dim} do not divide {part}a width of {width}")
    return heads, head_dim


class Attended(NamedTuple):
    """What a layer shares: the keys and values [B, S, K, D] that its queries attended to, and which saw which."""

    key: jax.Array
    value: jax.Array
    mask_TS: jax.Array


class SoftmaxAttention(nnx.Module):
    """Causal softmax attention over a ring of cache slots: after the sinks, position p lives in slot p mod the rest."""

    def __init__(self, shape: SoftmaxShape, parts: Mapping[str, Any], cache: KVCache) -> None:
        self.shape = shape
        self.parts = nnx.Dict(parts)
        self.cache = cache

    def score(self, x_BTW: jax.Array, cache: None, shared: Any) -> tuple[jax.Array, None, Any]:
        positions = jnp.arange(x_BTW.shape[1])
        if not self.shape.borrows:
            key, value = (self.cache.round_trip(tensor) for tensor in self._keys(x_BTW, positions))
            shared = Attended(key, value, self._visible(positions, positions))
        query, mask = self._query(x_BTW, positions), shared.mask_TS
        if self.shape.blocks is not None:
            mask = self._chosen(query, self._key_sums(shared.key), positions, mask)
        return self._output(attend(query, shared.key, shared.value, mask, "dot")), cache, shared

    def prefill(
        self, x_BTW: jax.Array, cache: dict, shared: Any, start: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, dict, Any]:
        tokens = x_BTW.shape[1]
        positions = start + jnp.arange(tokens)
        query = self._query(x_BTW, positions)
        if self.shape.borrows:
            return self._output(attend(query, shared.key, shared.value, shared.mask_TS, "dot")), cache, shared
        key, value = self._keys(x_BTW, positions)
        # The chunk is attended to beside the cache and written afterwards: in a ring, writing first would
        # overwrite tokens that the chunk's own first tokens still see.
        slots = self.cache.slots(cache, "key")
        key_positions = jnp.concatenate([self.held(start - 1, slots), positions])
        keys = jnp.concatenate([self.cache.load(cache, "key"), self.cache.round_trip(key)], axis=1)
        values = jnp.concatenate([self.cache.load(cache, "value"), self.cache.round_trip(value)], axis=1)
        shared = Attended(keys, values, self._visible(positions, key_positions))
        cache = self.cache.write(cache, {"key": key, "value": value}, self.targets(start, tokens, length, slots))
        mask = shared.mask_TS
        if self.shape.blocks is not None:
            real = jnp.arange(tokens) < length
            sums = self._add_sums(cache["key_sum"]["values"], self.cache.round_trip(key), positions, real, start)
            cache = cache | {"key_sum": {"values": sums}}
            mask = self._chosen(query, sums, positions, mask, key_positions)
        return self._output(attend(query, keys, values, mask, "dot")), cache, shared

    def decode_step(
        self, x_B1W: jax.Array, cache: dict, shared: Any, position: jax.Array
    ) -> tuple[jax.Array, dict, Any]:
        lowering, positions = self.cache.lowering, position[None]
        query = self._query(x_B1W, positions)
        if self.shape.borrows:
            return self._output(attend(query, shared.key, shared.value, shared.mask_TS, lowering)), cache, shared
        slots = self.cache.slots(cache, "key")
        key, value = self._keys(x_B1W, positions)
        cache = self.cache.append(cache, {"key": key, "value": value}, self.slot(position, slots))
        if self.shape.blocks is not None:
            return self._decode_blocks(query, key, cache, shared, position)
        mask = (self.held(position, slots) >= 0)[None, :]
        shared = Attended(self.cache.load(cache, "key"), self.cache.load(cache, "value"), mask)
        if lowering in ATTENTION_KERNELS:
            kernel, attention = ATTENTION_KERNELS[lowering], self.shape.over(self.cache, len(x_B1W), slots)
            if kernel.why_not(attention) is None:
                length = jnp.minimum(position + 1, slots)
                out = kernel(query[:, 0], cache["key"], cache["value"], length, attention)
                return self._output(out[:, None]), cache, shared
        return self._output(attend(query, shared.key, shared.value, shared.mask_TS, lowering)), cache, shared

    def _decode_blocks(
        self, query: jax.Array, key: jax.Array, cache: dict, shared: Any, position: jax.Array
    ) -> tuple[jax.Array, dict, Any]:
        """Read the sums of all blocks, and the keys and values of the chosen blocks only."""
        blocks = self.shape.blocks
        assert blocks is not None
        positions, stored = position[None], self.cache.round_trip(key)
        sums = self._add_sums(cache["key_sum"]["values"], stored, positions, jnp.ones(1, bool), position)
        cache = cache | {"key_sum": {"values": sums}}
        order = self._best(self._block_scores(query, sums, positions))[:, :, 0]  # [B, K, N kept]
        mine = jnp.broadcast_to(position // blocks.size, (*order.shape[:2], 1))
        chosen = jnp.concatenate([mine, order], axis=-1)
        # A sequence may be too short for as many blocks as are kept: what stands there for them is of later positions.
        at = chosen[..., None] * blocks.size + jnp.arange(blocks.size)
        seen = (at <= position) & ((chosen < position // blocks.size) | (jnp.arange(chosen.shape[-1]) == 0))[..., None]
        keys = self.cache.load_blocks(cache, "key", chosen, blocks.size)
        values = self.cache.load_blocks(cache, "value", chosen, blocks.size)
        mask = seen.reshape(*seen.shape[:2], 1, -1)  # [B, K, T, S]
        return self._output(attend(query, keys, values, mask, self.cache.lowering)), cache, shared

    def _query(self, x_BTW: jax.Array, positions_T: jax.Array) -> jax.Array:
        query = self.parts["query"](x_BTW).reshape(*x_BTW.shape[:2], self.shape.heads, self.shape.head_dim)
        return rotate(self._norm(query, "query_norm"), positions_T)

    def _keys(self, x_BTW: jax.Array, positions_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        key, value = (
            self.parts[name](x_BTW).reshape(*x_BTW.shape[:2], self.shape.kv_heads, self.shape.head_dim)
            for name in ("key", "value")
        )
        return rotate(self._norm(key, "key_norm"), positions_T), value

    def _norm(self, x_BTHD: jax.Array, name: str) -> jax.Array:
        return rms_norm(x_BTHD, self.parts[name]()) if self.shape.qk_norm else x_BTHD

    def _output(self, out_BTHD: jax.Array) -> jax.Array:
        return self.parts["output"](out_BTHD.reshape(*out_BTHD.shape[:2], -1))

    def _visible(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """[T, S]: which queries see which keys; a key at a negative position is none."""
        distance = query_positions[:, None] - key_positions[None, :]
        seen = (distance >= 0) & (key_positions >= 0)
        if self.shape.window is None:
            return seen
        return seen & ((distance < self.shape.window) | (key_positions < self.shape.sinks))

    def _ring(self, slots: int) -> int:
        """How many of the slots newer tokens take over from older ones."""
        return max(slots - self.shape.sinks, 1)

    def slot(self, position: jax.Array, slots: int) -> jax.Array:
        """Where a token lives."""
        sinks = self.shape.sinks
        return jnp.where(position < sinks, position, sinks + (position - sinks) % self._ring(slots))

    def targets(self, start: jax.Array, tokens: int, length: jax.Array, slots: int) -> jax.Array:
        """[T]: where the tokens of a chunk are written, of which the first `length` are real; `slots` for none.

        Of tokens that fall on the same slot only the newest is kept; padding is not written at all.
        """
        positions, real = start + jnp.arange(tokens), jnp.arange(tokens) < length
        newest = (positions < self.shape.sinks) | (positions >= start + length - self._ring(slots))
        return jnp.where(real & newest, self.slot(positions, slots), slots)

    def held(self, newest: jax.Array, slots: int) -> jax.Array:
        """[S]: the position each slot holds once `newest` is written; negative where nothing is."""
        slot, sinks = jnp.arange(slots), self.shape.sinks
        held = newest - (newest - slot) % self._ring(slots)
        if sinks == 0:
            return held
        return jnp.where(slot < sinks, jnp.where(slot <= newest, slot, -1), jnp.where(held >= sinks, held, -1))

    def _key_sums(self, key_BSKD: jax.Array) -> jax.Array:
        """[B, N, K, D]: the sum of each block's keys, of a whole sequence."""
        positions = jnp.arange(key_BSKD.shape[1])
        shape = self.shape.states(key_BSKD.shape[0], key_BSKD.shape[1])["key_sum"]
        empty = jnp.zeros(shape, self.cache.state_dtype)
        return self._add_sums(empty, key_BSKD, positions, positions >= 0, jnp.int32(0))

    def _add_sums(
        self, sums_BNKD: jax.Array, key_BTKD: jax.Array, positions: jax.Array, real: jax.Array, start: jax.Array
    ) -> jax.Array:
        """Add the keys of a chunk that begins at `start`; blocks that begin in it or later are begun anew."""
        blocks = self.shape.blocks
        assert blocks is not None
        begun = jnp.arange(sums_BNKD.shape[1]) * blocks.size < start
        sums = jnp.where(begun[None, :, None, None], sums_BNKD, 0)
        added = jnp.where(real[None, :, None, None], key_BTKD.astype(sums.dtype), 0)
        return sums.at[:, positions // blocks.size].add(added, mode="drop")

    def _block_scores(self, query_BTHD: jax.Array, sums_BNKD: jax.Array, positions_T: jax.Array) -> jax.Array:
        """[B, K, T, N]: how well the mean key of each whole block answers a group's queries; -inf for blocks that do
        not lie wholly before the query's own (Lu et al. 2025, arXiv:2502.13189)."""
        blocks = self.shape.blocks
        assert blocks is not None
        batch, tokens, heads, head_dim = query_BTHD.shape
        kv_heads = self.shape.kv_heads
        query = query_BTHD.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim).sum(3)
        scores = jnp.einsum("btkd,bnkd->bktn", query.astype(sums_BNKD.dtype), sums_BNKD)
        before = jnp.arange(sums_BNKD.shape[1])[None, :] < positions_T[:, None] // blocks.size
        return jnp.where(before, scores, -jnp.inf)

    def _best(self, scores_BKTN: jax.Array) -> jax.Array:
        """[B, K, T, N kept]: the blocks that score best."""
        blocks = self.shape.blocks
        assert blocks is not None
        return jax.lax.top_k(scores_BKTN, min(blocks.kept, scores_BKTN.shape[-1]))[1]

    def _chosen(
        self,
        query: jax.Array,
        sums: jax.Array,
        positions: jax.Array,
        mask_TS: jax.Array,
        key_positions: jax.Array | None = None,
    ) -> jax.Array:
        """[B, K, T, S]: of what `mask` lets a query see, the keys in the blocks it chooses."""
        blocks = self.shape.blocks
        assert blocks is not None
        scores = self._block_scores(query, sums, positions)
        best = jax.nn.one_hot(self._best(scores), scores.shape[-1], dtype=bool).any(axis=-2) & (scores > -jnp.inf)
        best |= jnp.arange(scores.shape[-1]) == positions[:, None] // blocks.size
        key_positions = positions if key_positions is None else key_positions
        return mask_TS & jnp.take(best, jnp.maximum(key_positions, 0) // blocks.size, axis=-1)


def angles(positions_T: jax.Array, head_dim: int, dtype: Any = np.float32) -> tuple[jax.Array, jax.Array]:
    """The cosine and sine [T, D / 2] that tokens at these positions are turned by."""
    half = head_dim // 2
    angle = positions_T.astype(dtype)[:, None] * np.asarray(_THETA ** (-np.arange(half) / half), dtype)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHD: jax.Array, positions_T: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), the first half of D paired with the second."""
    dtype = jnp.promote_types(x_BTHD.dtype, jnp.float32)
    cos, sin = (one[:, None, :] for one in angles(positions_T, x_BTHD.shape[-1], dtype))
    first, second = jnp.split(x_BTHD.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BTHD.dtype)


def attend(
    query_BTHD: jax.Array, key_BSKD: jax.Array, value_BSKE: jax.Array, mask: jax.Array, lowering: str
) -> jax.Array:
    """Grouped softmax attention, [B, T, H, E]; the softmax runs in at least float32.

    `mask` is [T, S], or [B, K, T, S] where it differs by sequence and head.
    """
    batch, tokens, heads, head_dim = query_BTHD.shape
    kv_heads = key_BSKD.shape[2]
    query = query_BTHD.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query = query * np.asarray(head_dim**-0.5, query.dtype)
    if lowering == "multiply_reduce":
        scores = multiply_reduce("btkgd,bskd->btkgs", query, key_BSKD)
    else:
        scores = jnp.einsum("btkgd,bskd->btkgs", query, key_BSKD, preferred_element_type=dtype)
    seen = mask[None, :, None, None, :] if mask.ndim == 2 else mask.transpose(0, 2, 1, 3)[:, :, :, None, :]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    if lowering == "multiply_reduce":
        out = multiply_reduce("btkgs,bske->btkge", weights, value_BSKE)
    else:
        out = jnp.einsum(
            "btkgs,bske->btkge", weights.astype(value_BSKE.dtype), value_BSKE, preferred_element_type=dtype
        )
    return out.reshape(batch, tokens, heads, -1).astype(query_BTHD.dtype)
