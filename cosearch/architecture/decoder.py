"""The decoder in Flax NNX: `score` by teacher forcing, `prefill` and `decode_step` over a KV cache.

A `Decoder` is abstract: its parameters are shapes and dtypes. `bind` merges it with a flat dict of arrays,
path ("layers.0.attention.query.values") to array, inside a traced function; so a model is always a pair of
what is computed (this module) and what it is computed with (plain arrays, which can be saved as they are).
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosearch.architecture import cache as kv
from cosearch.architecture import fused
from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.architecture.linear import Linear, MatrixStorage
from cosearch.architecture.norm import Vector, rms_norm
from cosearch.architecture.shape import (
    ABSORBED,
    DECIDES,
    EMBEDDING,
    VOCABULARY,
    WRITES_RESIDUAL,
    DecoderShape,
    LayerShape,
)
from cosearch.core.workload import OperatingPoint
from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS, Product
from cosearch.precision import FORMATS, Precision
from cosearch.schedule import Schedule

Params = Mapping[str, Any]
"""Path to array, as a decoder with some precision and schedule stores it."""
Weights = Mapping[str, np.ndarray]
"""Path to float32 array, one a matrix ([in, out]), stack of them or vector, however a model stores them."""

_EMBEDDING_SCALE = 10.0
"""A tied embedding must be small to give calm logits; read, it is scaled up to be heard in the residual stream."""


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream [B, T, W]; either may be skipped."""

    def __init__(
        self, width: int, shape: LayerShape, storage: Callable[[str], MatrixStorage], cache: kv.KVCache
    ) -> None:
        def linears(block: str, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Linear]:
            return {name: Linear(one, storage(f"{block}.{name}")) for name, one in sizes.items()}

        self.shape = shape
        if shape.attention is not None:
            self.attention_norm = Vector((width,), cache.state_dtype)
            vectors = {
                name: Vector(start.shape, cache.state_dtype) for name, start in shape.attention.vectors().items()
            }
            matrices = linears("attention", shape.attention.linears(width))
            self.attention = shape.attention.build({**matrices, **vectors}, cache)
        if shape.feedforward is not None:
            self.feedforward_norm = Vector((width,), cache.state_dtype)
            self.feedforward: Any = nnx.Dict(linears("feedforward", shape.feedforward.linears(width)))

    def run(
        self, method: str, x: jax.Array, cache: Any, shared: Any, *positions: jax.Array
    ) -> tuple[jax.Array, Any, Any]:
        """The layer by `method` of its attention: score, prefill or decode_step."""
        if self.shape.attention is not None:
            normed = rms_norm(x, self.attention_norm())
            out, cache, shared = getattr(self.attention, method)(normed, cache, shared, *positions)
            x = x + out
        if self.shape.feedforward is not None:
            x = x + self.shape.feedforward(rms_norm(x, self.feedforward_norm()), self.feedforward)
        return x, cache, shared


class Decoder(nnx.Module):
    """A byte-level decoder in some precision and schedule; abstract until `bind` gives it its arrays.

    Of an `observed` one every matrix keeps what it was multiplied with (`Linear.observe`).
    """

    def __init__(
        self,
        shape: DecoderShape,
        precision: Precision = Precision(),
        schedule: Schedule = Schedule(),
        observed: bool = False,
    ) -> None:
        self.shape = shape
        self.precision = precision
        self.schedule = schedule
        self.observed = observed
        self.scanned = schedule.layers == "scan"
        self.embedding = Linear((shape.width, VOCABULARY), self.storage(EMBEDDING))
        if self.scanned:
            graph, spec = nnx.split(self._layer(0))
            self.layers: Any = nnx.merge(graph, jax.tree.map(lambda s: _stacked(s, len(shape.layers)), spec))
        else:
            self.layers = nnx.List([self._layer(index) for index in range(len(shape.layers))])
        self.norm = Vector((shape.width,), jnp.promote_types(precision.activations, jnp.float32))

    def storage(self, path: str) -> MatrixStorage:
        """How the matrix at `path` is stored and multiplied."""
        return replace(scheduled_as(self.shape, self.precision, self.schedule, path), observed=self.observed)

    def kv_cache(self, layer: int) -> kv.KVCache:
        """How a layer's cache is stored and read."""
        return cached_as(self.precision, self.schedule, layer)

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
        layers = [
            self.kv_cache(index).spec(layer.attention.cache(batch, capacity), layer.attention.states(batch, capacity))
            if layer.attention is not None
            else {}
            for index, layer in enumerate(self.shape.layers)
        ]
        if self.scanned:
            return jax.tree.map(lambda s: _stacked(s, len(layers)), layers[0])
        return layers

    def _layer(self, index: int) -> Layer:
        def storage(name: str) -> MatrixStorage:
            return self.storage(f"layers.{index}.{name}")

        return Layer(self.shape.width, self.shape.layers[index], storage, self.kv_cache(index))

    def _embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding.take(tokens, self.precision.activations) * _EMBEDDING_SCALE

    def _logits(self, x: jax.Array) -> jax.Array:
        return self.embedding(rms_norm(x, self.norm())).astype(jnp.promote_types(x.dtype, jnp.float32))

    def _layers(self, method: str, x: jax.Array, caches: Any, *positions: jax.Array) -> tuple[jax.Array, Any]:
        alone = runs_as_one(self.shape, self.precision, self.schedule, method)
        if self.scanned:
            graph, state = nnx.split(self.layers)

            def body(x: jax.Array, each: tuple[Any, Any]) -> tuple[jax.Array, Any]:
                layer, cache = nnx.merge(graph, each[0]), each[1]
                if alone[0]:
                    x, (cache,) = fused.run_layers([layer], method, x, [cache], *positions)
                else:
                    x, cache, _ = layer.run(method, x, cache, None, *positions)
                return x, cache

            return jax.lax.scan(body, x, (state, caches))
        if self.schedule.fusion == "step" and all(alone):
            return fused.run_layers(list(self.layers), method, x, caches, *positions)
        written, shared = [], None
        for layer, cache, one in zip(self.layers, caches, alone, strict=True):
            if one:
                x, (cache,) = fused.run_layers([layer], method, x, [cache], *positions)
            else:
                x, cache, shared = layer.run(method, x, cache, shared, *positions)
            written.append(cache)
        return x, written


def stored_as(shape: DecoderShape, precision: Precision, path: str) -> MatrixStorage:
    """How the matrix at `path` is stored, whatever the schedule."""
    name = precision.weight_format(path)
    rounded = precision.matmul_inputs in FORMATS[name].inputs and not path.endswith(DECIDES + ABSORBED)
    inputs = precision.matmul_inputs if rounded else "as_is"
    return MatrixStorage(name, inputs=inputs, compression=shape.compression_of(path))


def scheduled_as(shape: DecoderShape, precision: Precision, schedule: Schedule, path: str) -> MatrixStorage:
    """How the matrix at `path` is stored and multiplied."""
    stored = stored_as(shape, precision, path)
    limited = schedule.fuse_limit == "products"
    return replace(stored, layout=schedule.layout, lowering=schedule.matmul, limited=limited)


def cached_as(precision: Precision, schedule: Schedule, layer: int) -> kv.KVCache:
    """How a layer's cache is stored and read."""
    return kv.KVCache(precision.cache_format(layer), schedule.cache_layout, precision.activations, schedule.attention)


_SLOTS = 1024
"""What a kernel of attention is asked about where no workload says how many slots there are."""


@functools.lru_cache(4096)
def why_no_kernel(shape: DecoderShape, precision: Precision, schedule: Schedule) -> str | None:
    """Why the kernels that a schedule names, or its fusion, would do nothing; None where each does something."""
    dtype = precision.activations
    if schedule.matmul in MATMUL_KERNELS:
        kernel = MATMUL_KERNELS[schedule.matmul]
        reasons = [
            kernel.why_not(scheduled_as(shape, precision, schedule, path).product(1, (rows, columns), dtype))
            for path, (*_, rows, columns) in shape.linears().items()
        ]
        if None not in reasons:
            return f"schedule.matmul={schedule.matmul!r} multiplies none of the matrices: {reasons[0]}"
    if schedule.attention in ATTENTION_KERNELS:
        kernel, reasons = ATTENTION_KERNELS[schedule.attention], []
        for index, layer in enumerate(shape.layers):
            if isinstance(layer.attention, SoftmaxShape) and layer.attention.blocks is None:
                cache = cached_as(precision, schedule, index)
                reasons.append(kernel.why_not(layer.attention.over(cache, 1, _SLOTS)))
        if None not in reasons:
            why = reasons[0] if reasons else "no layer has softmax attention over all of a cache"
            return f"schedule.attention={schedule.attention!r} runs no layer's attention: {why}"
    if schedule.fusion == "step" and schedule.layers == "scan":
        return "schedule.fusion='step' runs all layers in one call, not one loop over them: take layers='unroll'"
    if schedule.fusion != "none":
        alone = why_not_fused(shape, precision, schedule)
        if None not in alone or (schedule.fusion == "step" and any(alone)):
            layer = next(index for index, why in enumerate(alone) if why)
            return f"schedule.fusion={schedule.fusion!r}: layer {layer} is not run as one call: {alone[layer]}"
    return None


def native_products(
    shape: DecoderShape, precision: Precision, schedule: Schedule, point: OperatingPoint
) -> list[Product]:
    """The products that the C++ kernels do in one run at an operating point; those that run as one count as one."""
    if schedule.matmul != "cpp":
        return []
    dtype, method = precision.activations, "prefill" if point.phase == "prefill" else "decode_step"
    logits = scheduled_as(shape, precision, schedule, EMBEDDING).product(point.batch, (shape.width, VOCABULARY), dtype)
    found = [logits]
    alone = runs_as_one(shape, precision, schedule, method)
    for index, layer in enumerate(shape.layers):
        for block, one in layer.blocks():
            sizes = {name: (rows, columns) for name, (*_, rows, columns) in one.linears(shape.width).items()}
            groups = [(name,) for name in sizes]
            if alone[index]:
                together = fused.multiplied_together(one)
                groups = [*together, *((name,) for name in sizes if name not in one.reads_norm)]
            for names in groups:
                storage = scheduled_as(shape, precision, schedule, f"layers.{index}.{block}.{names[0]}")
                whole = (sizes[names[0]][0], sum(sizes[name][1] for name in names))
                found.append(storage.product(point.tokens, whole, dtype))
    return [product for product in found if MATMUL_KERNELS["cpp"].why_not(product) is None]


@functools.lru_cache(4096)
def why_not_fused(shape: DecoderShape, precision: Precision, schedule: Schedule) -> tuple[str | None, ...]:
    """For each layer, why no single call runs it; None where one does."""
    if schedule.fusion == "none":
        return ("it is not asked for",) * len(shape.layers)
    if schedule.matmul != "cpp":
        return ("only products by the kernel 'cpp' run as one call with what is around them",) * len(shape.layers)
    reasons: list[str | None] = []
    sharing = _sharing(shape)
    for index, layer in enumerate(shape.layers):
        if schedule.fusion == "layer" and index in sharing:
            reasons.append("it shares keys with another layer")
            continue
        storages = {
            f"{block}.{name}": scheduled_as(shape, precision, schedule, f"layers.{index}.{block}.{name}")
            for block, one in layer.blocks()
            for name in one.linears(shape.width)
        }
        reasons.append(fused.why_not(layer, storages, cached_as(precision, schedule, index), shape.width))
    return tuple(reasons)


def runs_as_one(shape: DecoderShape, precision: Precision, schedule: Schedule, method: str) -> list[bool]:
    """For each layer, whether a single call runs it by this method, alone or with all others."""
    reasons = why_not_fused(shape, precision, schedule)
    alone = [why is None and fused.runs(layer, method) for why, layer in zip(reasons, shape.layers, strict=True)]
    if schedule.fusion == "step" and not all(alone):
        return [False] * len(alone)  # some may need what others leave for them
    return alone


def _sharing(shape: DecoderShape) -> set[int]:
    """The layers that borrow keys and values, and those that lend them: the next below that attend."""
    found, below = set(), -1
    for index, layer in enumerate(shape.layers):
        if isinstance(layer.attention, SoftmaxShape) and layer.attention.borrows:
            found |= {below, index}
        if layer.attention is not None:
            below = index
    return found


@functools.lru_cache(4096)  # thousands of candidates are screened, over few models
def why_not(shape: DecoderShape, precision: Precision) -> str | None:
    """Why a decoder of this shape cannot be stored in these formats; None where it can."""
    matrices = shape.linears()
    for path, sizes in matrices.items():
        if why := stored_as(shape, precision, path).why_not(sizes):
            return f"{path}: {why}"
    for index, layer in enumerate(shape.layers):
        if layer.attention is not None:
            name = precision.cache_format(index)
            for tensor, (*_, size) in layer.attention.cache(1, 1).items():
                if why := kv.why_not(name, size):
                    return f"layers.{index}.attention: {name} does not hold the cached {tensor}: {why}"
    if precision.calibration == "gptq" and shape.compression is not None:
        return "calibration 'gptq' knows whole matrices only; the criterion 'sparsegpt' does for compressed ones"
    return precision.why_not(matrices)


@functools.lru_cache(4096)
def scannable(shape: DecoderShape, precision: Precision) -> bool:
    """Whether one loop can run the layers: all alike, in sizes and in formats."""
    formats = {}
    for path in shape.linears():
        if path.startswith("layers."):
            _, index, name = path.split(".", 2)
            formats.setdefault(index, []).append((name, precision.weight_format(path)))
    caches = {precision.cache_format(index) for index in range(len(shape.layers))}
    return shape.uniform and len(set(map(tuple, formats.values()))) == 1 and len(caches) == 1


def plain_decoder(shape: DecoderShape, precision: Precision = Precision()) -> Decoder:
    """The decoder with every schedule knob at its default: one loop over the layers, where they are equal."""
    return Decoder(shape, precision, Schedule(layers="scan" if scannable(shape, precision) else "unroll"))


def params_spec(decoder: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter's path to its shape and dtype."""
    return {_path(keys): variable.get_value() for keys, variable in nnx.to_flat_state(nnx.state(decoder, nnx.Param))}


def bind(decoder: Decoder, params: Params) -> Decoder:
    """`decoder` with its arrays; for use inside a traced function."""
    graph, state = nnx.split(decoder)
    flat = [(keys, variable.replace(params[_path(keys)])) for keys, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def pack(decoder: Decoder, weights: Weights, scales: Weights = MappingProxyType({})) -> dict[str, np.ndarray]:
    """Store `weights` the way `decoder` does: its formats, its layout, its layers stacked or not.

    `scales` are what a calibration chose, by the path of the matrix.

    Raises:
        Rejected: a format cannot hold them.
    """
    matrices = decoder.shape.linears()
    params: dict[str, np.ndarray] = {}
    dtype = params_spec(decoder)["norm.scale"].dtype
    for path, array in weights.items():
        if path in matrices:
            stored = decoder.storage(path).pack(np.asarray(array), scales.get(path))
            params |= {f"{path}.{part}": values for part, values in stored.items()}
        else:
            params[f"{path}.scale"] = np.asarray(array).astype(dtype)
    if decoder.scanned:
        depth = len(decoder.shape.layers)
        tails = {path.removeprefix("layers.0.") for path in params if path.startswith("layers.0.")}
        stacked = {f"layers.{tail}": np.stack([params[f"layers.{i}.{tail}"] for i in range(depth)]) for tail in tails}
        params = {path: array for path, array in params.items() if not path.startswith("layers.")} | stacked
    return params


def unpack(decoder: Decoder, params: Params) -> dict[str, np.ndarray]:
    """The weights that packed `params` stand for, in float64."""
    flat = layered(decoder, {path: np.asarray(array) for path, array in params.items()})
    weights = {}
    for path, sizes in decoder.shape.linears().items():
        prefix = f"{path}."
        stored = {name.removeprefix(prefix): array for name, array in flat.items() if name.startswith(prefix)}
        weights[path] = decoder.storage(path).unpack(stored, sizes)
    for path in decoder.shape.vectors():
        weights[path] = flat[f"{path}.scale"].astype(np.float64)
    return weights


def layered(decoder: Decoder, params: Params) -> dict[str, Any]:
    """`params` with one entry a layer, also where the decoder stacks them."""
    if not decoder.scanned:
        return dict(params)
    inner = {path: array for path, array in params.items() if path.startswith("layers.")}
    return {path: array for path, array in params.items() if path not in inner} | {
        f"layers.{index}.{path.removeprefix('layers.')}": array[index]
        for path, array in inner.items()
        for index in range(len(decoder.shape.layers))
    }


def random_weights(shape: DecoderShape, seed: int) -> dict[str, np.ndarray]:
    """Weights as a training starts from: matrices normal with variance 1 / in, those that write to the
    residual stream smaller by the root of twice the depth, the embedding small beside its scale on reading."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    for path, sizes in shape.linears().items():
        scale = 0.03 if path == EMBEDDING else sizes[-2] ** -0.5
        if path.endswith(WRITES_RESIDUAL):
            scale /= (2 * len(shape.layers)) ** 0.5
        weights[path] = (rng.standard_normal(sizes) * scale).astype(np.float32)
    return weights | shape.vectors()


def _stacked(spec: jax.ShapeDtypeStruct, depth: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((depth, *spec.shape), spec.dtype)


def _path(keys: tuple[Any, ...]) -> str:
    """A parameter's path, without the attributes that only say how its module keeps it."""
    return ".".join(str(key) for key in keys if key not in ("parts", "stored"))
