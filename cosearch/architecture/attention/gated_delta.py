"""Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464): linear attention whose state is as large for any context."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosearch.architecture.attention import ATTENTION, Place
from cosearch.architecture.attention.delta_rule import chunked, step
from cosearch.architecture.attention.softmax import heads_of
from cosearch.architecture.cache import KVCache
from cosearch.architecture.norm import rms_norm
from cosearch.core.candidate import Value
from cosearch.core.space import Knob

_TAPS = 4
"""How many tokens, itself included, the short convolutions see."""


@dataclass(frozen=True)
class GatedDeltaShape:
    """`heads`, each with a state of `head_dim` times `head_dim`."""

    heads: int
    head_dim: int

    @property
    def reads_norm(self) -> tuple[str, ...]:
        return ("query", "key", "value", "gate", "beta", "decay")

    def linears(self, width: int) -> Mapping[str, tuple[int, ...]]:
        wide = self.heads * self.head_dim
        return {
            **dict.fromkeys(("query", "key", "value", "gate"), (width, wide)),
            **dict.fromkeys(("beta", "decay"), (width, self.heads)),
            "output": (wide, width),
        }

    def vectors(self) -> Mapping[str, np.ndarray]:
        # Queries and values start as those of their own token, keys as those of the token before it: "after this came
        # that" is what a state must hold to recall. Heads forget half within some 900 tokens, the first, to some 9.
        # The spread lies in the rate and not in the bias, so that no input makes a slow head forget fast.
        conv = np.zeros((_TAPS, 3, self.heads * self.head_dim), np.float32)
        conv[-1, 0] = conv[-2, 1] = conv[-1, 2] = 1
        return {
            "conv": conv.reshape(_TAPS, -1),
            "decay_rate": np.log(np.geomspace(1e-3, 1e-1, self.heads)).astype(np.float32),
            "decay_bias": np.zeros(self.heads, np.float32),
            "output_norm": np.ones(self.head_dim, np.float32),
        }

    def cache(self, batch: int, capacity: int) -> Mapping[str, tuple[int, int, int, int]]:
        return {}

    def states(self, batch: int, capacity: int) -> Mapping[str, tuple[int, ...]]:
        return {
            "state": (batch, self.heads, self.head_dim, self.head_dim),
            "conv": (batch, _TAPS - 1, 3 * self.heads * self.head_dim),
        }

    def reads(self, batch: int, capacity: int) -> Mapping[str, tuple[int, int, int, int]]:
        return {}

    def multiplications(self, tokens: int, context: int) -> float:
        # The state fades, is read by key and query, and written; three convolutions.
        return float(tokens * self.heads * self.head_dim * (4 * self.head_dim + 3 * _TAPS))

    def build(self, parts: Mapping[str, Any], cache: KVCache) -> "GatedDelta":
        return GatedDelta(self, parts, cache)


class GatedDelta(nnx.Module):
    """The gated delta rule over convolved queries, keys and values.

    The cache holds the state [B, H, D keys, D values], and the last inputs of the convolutions [B, 3, 3 * H * D].
    """

    def __init__(self, shape: GatedDeltaShape, parts: Mapping[str, Any], cache: KVCache) -> None:
        self.shape = shape
        self.parts = nnx.Dict(parts)
        self.cache = cache

    def score(self, x_BTW: jax.Array, cache: None, shared: Any) -> tuple[jax.Array, None, Any]:
        empty = {
            name: jnp.zeros(shape, self.cache.state_dtype) for name, shape in self.shape.states(len(x_BTW), 0).items()
        }
        inputs = self._inputs(x_BTW, empty["conv"])
        out, _ = chunked(*self._tokens(inputs), *self._gates(x_BTW), empty["state"])
        return self._output(x_BTW, out), cache, shared

    def prefill(
        self, x_BTW: jax.Array, cache: dict, shared: Any, start: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, dict, Any]:
        state, conv = (jnp.where(start > 0, cache[name]["values"], 0) for name in ("state", "conv"))
        inputs = self._inputs(x_BTW, conv)
        real = (jnp.arange(x_BTW.shape[1]) < length)[:, None]
        fade, rate = (jnp.where(real, gate, 0) for gate in self._gates(x_BTW))
        out, state = chunked(*self._tokens(inputs), fade, rate, state)
        conv = jax.lax.dynamic_slice_in_dim(inputs, length, _TAPS - 1, axis=1)
        return self._output(x_BTW, out), {"state": {"values": state}, "conv": {"values": conv}}, shared

    def decode_step(
        self, x_B1W: jax.Array, cache: dict, shared: Any, position: jax.Array
    ) -> tuple[jax.Array, dict, Any]:
        inputs = self._inputs(x_B1W, cache["conv"]["values"])
        query, key, value, fade, rate = (x[:, 0] for x in (*self._tokens(inputs), *self._gates(x_B1W)))
        out, state = step(query, key, value, fade, rate, cache["state"]["values"], self.cache.lowering)
        cache = {"state": {"values": state}, "conv": {"values": inputs[:, 1:]}}
        return self._output(x_B1W, out[:, None]), cache, shared

    def _inputs(self, x_BTW: jax.Array, before: jax.Array) -> jax.Array:
        """[B, 3 + T, 3 * H * D]: what the convolutions see, after what they saw of the tokens `before`."""
        query, key, value = (self.parts[name](x_BTW) for name in ("query", "key", "value"))
        # The matrix `query` holds how queries differ from keys. It is the same family of models, but queries start near
        # the keys of their own byte: recall of 0.91 after 160 steps, and 0.20, below chance, where they do not (width
        # 64, depth 2). Likely because a state that is asked at random gives no hint of what to write into it.
        inputs = jnp.concatenate([query + key, key, value], axis=-1)
        return jnp.concatenate([before, inputs.astype(before.dtype)], axis=1)

    def _tokens(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys of length 1, and values, each [B, T, H, D]."""
        tokens = inputs.shape[1] - (_TAPS - 1)
        taps = self.parts["conv"]()
        mixed = jax.nn.silu(sum(taps[i] * inputs[:, i : i + tokens] for i in range(_TAPS)))
        query, key, value = jnp.moveaxis(mixed.reshape(*mixed.shape[:2], 3, self.shape.heads, -1), 2, 0)
        return _unit(query), _unit(key), value

    def _gates(self, x_BTW: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How much the state fades, as a logarithm, and the rate at which it learns, each [B, T, H]."""
        decay, beta = (self.parts[name](x_BTW).astype(self.cache.state_dtype) for name in ("decay", "beta"))
        fade = -jnp.exp(self.parts["decay_rate"]()) * jax.nn.softplus(decay + self.parts["decay_bias"]())
        return fade, jax.nn.sigmoid(beta)

    def _output(self, x_BTW: jax.Array, out_BTHD: jax.Array) -> jax.Array:
        out = rms_norm(out_BTHD, self.parts["output_norm"]()).reshape(*x_BTW.shape[:2], -1).astype(x_BTW.dtype)
        return self.parts["output"](out * jax.nn.silu(self.parts["gate"](x_BTW)))


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-6)


class GatedDeltaNet:
    knobs: Mapping[str, Knob] = {}

    def shape(self, place: Place, choices: Mapping[str, Value]) -> GatedDeltaShape:
        return GatedDeltaShape(*heads_of(place.width, choices))


ATTENTION.register("gated_delta")(GatedDeltaNet())
