"""The decoder in Flax NNX: `score` by teacher forcing, `prefill` and `decode_step` over a KV cache.

A `Decoder` is abstract: its parameters are shapes and dtypes. `bind` merges it with a flat dict of arrays,
path ("layers.0.attention.query.values") to array, inside a traced function; so a model is always a pair of
what is computed (this module) and what it is computed with (plain arrays, which can be saved as they are).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosearch.architecture import cache as kv
from cosearch.architecture.linear import Linear, MatrixStorage
from cosearch.architecture.shape import VOCABULARY, DecoderShape, LayerShape
from cosearch.precision import FORMATS, Precision
from cosearch.schedule import Schedule

Params = Mapping[str, Any]
"""Path to array, as a decoder with some precision and schedule stores it."""
Weights = Mapping[str, np.ndarray]
"""Path to float32 array, one a matrix ([in, out]) or norm, however a model stores them."""

_EMBEDDING_SCALE = 10.0
"""A tied embedding must be small to give calm logits; read, it is scaled up to be heard in the residual stream."""


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467), in at least float32."""

    def __init__(self, width: int, dtype: Any) -> None:
        self.scale = nnx.Param(jax.ShapeDtypeStruct((width,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + 1e-6) * self.scale[...]).astype(x.dtype)


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream [B, T, W]."""

    def __init__(self, width: int, shape: LayerShape, storage: MatrixStorage, cache: kv.KVCache) -> None:
        norm_dtype = jnp.promote_types(cache.dtype, jnp.float32)
        self.attention_norm = RMSNorm(width, norm_dtype)
        parts: dict[str, nnx.Module] = {
            name: Linear(*sizes, storage) for name, sizes in shape.attention.linears(width).items()
        }
        parts |= {name: RMSNorm(size, norm_dtype) for name, (size, _) in shape.attention.norms().items()}
        self.attention: Any = shape.attention.build(parts, cache)  # an AttentionModule
        self.feedforward_norm = RMSNorm(width, norm_dtype)
        self.feedforward = FeedForward(width, shape, storage)

    def score(self, x: jax.Array, cache: None) -> tuple[jax.Array, None]:
        x = x + self.attention.score(self.attention_norm(x))
        return x + self.feedforward(self.feedforward_norm(x)), cache

    def prefill(self, x: jax.Array, cache: Any, start: jax.Array, length: jax.Array) -> tuple[jax.Array, Any]:
        out, cache = self.attention.prefill(self.attention_norm(x), cache, start, length)
        x = x + out
        return x + self.feedforward(self.feedforward_norm(x)), cache

    def decode_step(self, x: jax.Array, cache: Any, position: jax.Array) -> tuple[jax.Array, Any]:
        out, cache = self.attention.decode_step(self.attention_norm(x), cache, position)
        x = x + out
        return x + self.feedforward(self.feedforward_norm(x)), cache


class FeedForward(nnx.Module):
    """The layer's feed-forward shape over its matrices."""

    def __init__(self, width: int, shape: LayerShape, storage: MatrixStorage) -> None:
        self.shape = shape.feedforward
        linears = shape.feedforward.linears(width).items()
        self.parts = nnx.Dict({name: Linear(*sizes, storage) for name, sizes in linears})

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.shape(x, self.parts)


class Decoder(nnx.Module):
    """A byte-level decoder in some precision and schedule; abstract until `bind` gives it its arrays."""

    def __init__(
        self, shape: DecoderShape, precision: Precision = Precision(), schedule: Schedule = Schedule()
    ) -> None:
        self.shape = shape
        self.precision = precision
        self.scanned = schedule.layers == "scan"
        self.kv_cache = kv.KVCache(precision.kv_cache, schedule.cache_layout, precision.activations, schedule.attention)
        storage = MatrixStorage(precision.weights, schedule.weight_layout, schedule.matmul)
        self.embedding = Linear(shape.width, VOCABULARY, storage)
        if self.scanned:
            graph, spec = nnx.split(Layer(shape.width, shape.layers[0], storage, self.kv_cache))
            self.layers: Any = nnx.merge(graph, jax.tree.map(lambda s: _stacked(s, len(shape.layers)), spec))
        else:
            self.layers = nnx.List([Layer(shape.width, layer, storage, self.kv_cache) for layer in shape.layers])
        self.norm = RMSNorm(shape.width, jnp.promote_types(precision.activations, jnp.float32))

    def score(self, tokens_BT: jax.Array) -> jax.Array:
        """Logits [B, T, 256] of the byte after each, in at least float32."""
        x, _ = self._layers("score", self._embed(tokens_BT), None if self.scanned else [None] * len(self.shape.layers))
        return self._logits(x)

    def prefill(self, cache: Any, tokens_BT: jax.Array, start: jax.Array, length: jax.Array) -> tuple[jax.Array, Any]:
        """Put the first `length` of `tokens` at positions `start`… into the cache.

        Returns the logits [B, 256] after the last of them, and the cache.
        """
        x, cache = self._layers("prefill", self._embed(tokens_BT), cache, start, length)
        last = jax.lax.dynamic_slice_in_dim(x, length - 1, 1, axis=1)
        return self._logits(last)[:, 0], cache

    def decode_step(self, cache: Any, tokens_B: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        """Put `tokens` at `position` into the cache; returns the logits [B, 256] after them, and the cache."""
        x, cache = self._layers("decode_step", self._embed(tokens_B[:, None]), cache, position)
        return self._logits(x)[:, 0], cache

    def cache_spec(self, batch: int, capacity: int) -> Any:
        """The arrays of an empty cache for `capacity` tokens of `batch` sequences: one entry a layer, or, for
        scanned layers, one entry with a leading axis over them."""
        layers = [self.kv_cache.spec(layer.attention.cache(batch, capacity)) for layer in self.shape.layers]
        if self.scanned:
            return jax.tree.map(lambda s: _stacked(s, len(layers)), layers[0])
        return layers

    def _embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding.take(tokens, self.precision.activations) * _EMBEDDING_SCALE

    def _logits(self, x: jax.Array) -> jax.Array:
        return self.embedding(self.norm(x)).astype(jnp.promote_types(x.dtype, jnp.float32))

    def _layers(self, method: str, x: jax.Array, caches: Any, *positions: jax.Array) -> tuple[jax.Array, Any]:
        if self.scanned:
            graph, state = nnx.split(self.layers)

            def body(x: jax.Array, each: tuple[Any, Any]) -> tuple[jax.Array, Any]:
                layer_state, cache = each
                return getattr(nnx.merge(graph, layer_state), method)(x, cache, *positions)

            return jax.lax.scan(body, x, (state, caches))
        written = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = getattr(layer, method)(x, cache, *positions)
            written.append(cache)
        return x, written


def plain_decoder(shape: DecoderShape, precision: Precision = Precision()) -> Decoder:
    """The decoder with every schedule knob at its default: one loop over the layers, where they are equal."""
    return Decoder(shape, precision, Schedule(layers="scan" if shape.uniform else "unroll"))


def params_spec(decoder: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter's path to its shape and dtype."""
    return {_path(keys): variable.get_value() for keys, variable in nnx.to_flat_state(nnx.state(decoder, nnx.Param))}


def bind(decoder: Decoder, params: Params) -> Decoder:
    """`decoder` with its arrays; for use inside a traced function."""
    graph, state = nnx.split(decoder)
    flat = [(keys, variable.replace(params[_path(keys)])) for keys, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def pack(decoder: Decoder, weights: Weights) -> dict[str, np.ndarray]:
    """Store `weights` the way `decoder` does: its format, its layout, its layers stacked or not.

    Raises:
        Rejected: a format cannot hold them.
    """
    storage = decoder.embedding.storage
    float_format = FORMATS[storage.format]
    matrices = decoder.shape.linears()
    params: dict[str, np.ndarray] = {}
    spec = params_spec(decoder)
    for path, array in weights.items():
        if path in matrices:
            stored = float_format.pack(array, storage.layout)
            params |= {f"{path}.{part}": values for part, values in stored.items()}
        else:
            params[f"{path}.scale"] = np.asarray(array).astype(spec["norm.scale"].dtype)
    if decoder.scanned:
        depth = len(decoder.shape.layers)
        tails = {path.removeprefix("layers.0.") for path in params if path.startswith("layers.0.")}
        stacked = {f"layers.{tail}": np.stack([params[f"layers.{i}.{tail}"] for i in range(depth)]) for tail in tails}
        params = {path: array for path, array in params.items() if not path.startswith("layers.")} | stacked
    return params


def unpack(decoder: Decoder, params: Params) -> dict[str, np.ndarray]:
    """The weights that packed `params` stand for, in float64."""
    storage = decoder.embedding.storage
    params = {path: np.asarray(array) for path, array in params.items()}
    if decoder.scanned:
        inner = {path: array for path, array in params.items() if path.startswith("layers.")}
        params = {path: array for path, array in params.items() if path not in inner} | {
            f"layers.{i}.{path.removeprefix('layers.')}": layer
            for path, array in inner.items()
            for i, layer in enumerate(array)
        }
    weights = {}
    for path in decoder.shape.linears():
        prefix = f"{path}."
        stored = {name.removeprefix(prefix): array for name, array in params.items() if name.startswith(prefix)}
        weights[path] = FORMATS[storage.format].unpack(stored, storage.layout)
    for path in decoder.shape.norms():
        weights[path] = params[f"{path}.scale"].astype(np.float64)
    return weights


def random_weights(shape: DecoderShape, seed: int) -> dict[str, np.ndarray]:
    """Weights as a training starts from: matrices normal with variance 1 / in, those that write to the
    residual stream smaller by the root of twice the depth, the embedding small beside its scale on reading."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    for path, (rows, columns) in shape.linears().items():
        scale = 0.03 if path == "embedding" else rows**-0.5
        if path.endswith((".output", ".down")):
            scale /= (2 * len(shape.layers)) ** 0.5
        weights[path] = (rng.standard_normal((rows, columns)) * scale).astype(np.float32)
    for path, (size, start) in shape.norms().items():
        weights[path] = np.full(size, start, np.float32)
    return weights


def _stacked(spec: jax.ShapeDtypeStruct, depth: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((depth, *spec.shape), spec.dtype)


def _path(keys: tuple[Any, ...]) -> str:
    """A parameter's path, without the attributes that only say how its module keeps it."""
    return ".".join(str(key) for key in keys if key not in ("parts", "stored"))
