"""The contracts of attention and feed-forward variants: steps give what teacher forcing gives."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import le
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosearch.architecture import cache as kv
from cosearch.architecture.attention import ATTENTION
from cosearch.architecture.decoder import Decoder, bind, pack, params_spec, plain_decoder, random_weights
from cosearch.architecture.feedforward import FEEDFORWARD, FeedForwardShape
from cosearch.architecture.linear import Linear, MatrixStorage
from cosearch.architecture.shape import WRITES_RESIDUAL, DecoderShape
from cosearch.core.candidate import Choices, Value
from cosearch.core.errors import Rejected
from cosearch.core.registry import Registry
from cosearch.precision import Precision
from cosearch.schedule import Schedule
from cosearch.testing.common import NONE, close, flat, require, same_arrays

SMALL: Mapping[str, Value] = {"width": 64, "depth": 2, "head_dim": 16, "kv_heads": 2, "window": 8, "ffn_ratio": 1}
"""Choices that make a decoder small; knobs that are not named here stand at their defaults."""
BATCH, CAPACITY = 2, 24


@dataclass(frozen=True)
class Case:
    """One way to run a decoder, and how nearly its steps must give what teacher forcing gives."""

    dtype: str
    tolerance: float
    chunk: int
    schedule: Schedule


CASES = (
    Case("float64", 1e-9, 10, Schedule()),
    Case("float64", 1e-9, 3, Schedule("unroll", "multiply_reduce", "out_in", "multiply_reduce", "bhds")),
    Case("float32", 1e-4, 10, Schedule(layers="unroll", cache_layout="bhsd")),
)


def check_attention(name: str, choices: Mapping[str, Value] = NONE) -> None:
    """Check the attention variant `name` in a small decoder.

    `choices` are for knobs whose defaults do not fit a width of 64. Teacher forcing, prefill in padded chunks and
    single steps must give the same logits, whatever the schedule; what is declared must be what is there. A variant
    that cannot stand alone stands above a layer of `mha`.
    """
    try:
        DecoderShape.of(Choices({**SMALL, "attention": name, **choices}))
        layers: Value = name
    except Rejected:
        layers = ("mha", name)
    shape = _small_shape(ATTENTION, name, {"attention": layers, **choices})
    scores = [check_decoding(shape, case) for case in CASES]
    close(scores[1], scores[0], CASES[0].tolerance, "layers unrolled and in other layouts give what one loop gives")
    _check_gradients(shape)


def check_feedforward(name: str, choices: Mapping[str, Value] = NONE) -> None:
    """Check the feed-forward variant `name`: each token on its own, and in a small decoder as attention is checked."""
    shape = _small_shape(FEEDFORWARD, name, {"feedforward": name, **choices})
    block = shape.layers[0].feedforward
    if block is not None:
        _check_block(block, shape.width)
    check_decoding(shape, CASES[1])
    _check_gradients(shape)


def _check_block(block: FeedForwardShape, width: int) -> None:
    sizes = block.linears(width)
    for part in sizes:
        few, many = block.read_fraction(part, 1), block.read_fraction(part, 1 << 20)
        require(0 < few <= many <= 1, f"more of {part} is read for more tokens, at most all: {few} and {many}")
    rng, storage = np.random.default_rng(0), MatrixStorage("float64")
    with jax.enable_x64(True):
        linears = {part: Linear(one, storage) for part, one in sizes.items()}
        for part, linear in linears.items():
            stored = storage.pack(rng.standard_normal(sizes[part]) / sizes[part][-2] ** 0.5)
            arrays: dict[str, Any] = {name: nnx.Param(jnp.asarray(array)) for name, array in stored.items()}
            linear.stored = nnx.Dict(arrays)
        x = jnp.asarray(rng.standard_normal((2, 5, width)))
        out = block(x, linears)
        require(
            out.shape == x.shape and out.dtype == x.dtype,
            f"feed-forward gives what it gets, {x.shape} of {x.dtype}, not {out.shape} of {out.dtype}",
        )
        close(block(x[1:, 3:4], linears)[0, 0], out[1, 3], 1e-9, "each token is fed forward on its own")


def _small_shape(registry: Registry[Any], name: str, choices: Mapping[str, Value]) -> DecoderShape:
    require(name in registry, f"{name!r} is registered among {registry.names()}")
    try:
        shape, again = (DecoderShape.of(Choices({**SMALL, **choices})) for _ in range(2))
    except Rejected as rejection:
        raise AssertionError(
            f"the {registry.kind}'s defaults must fit a small decoder, or its `choices` be given: {rejection}"
        ) from None
    require(shape == again and hash(shape) == hash(again), "equal choices make equal, hashable shapes")
    _check_declared(shape)
    return shape


def check_decoding(shape: DecoderShape, case: Case) -> np.ndarray:
    """Check that prefill and steps agree with `score`, whose logits are returned."""
    rng = np.random.default_rng(1)
    schedule = case.schedule if shape.uniform else replace(case.schedule, layers="unroll")
    with jax.enable_x64(case.dtype == "float64"):
        model = Decoder(shape, Precision(case.dtype, case.dtype, case.dtype), schedule)
        params = pack(model, random_weights(shape, 0))
        same_arrays("a parameter", params_spec(model), params)
        tokens = rng.integers(0, 256, (BATCH, CAPACITY), dtype=np.int32)
        scored = jax.jit(lambda p, t: bind(model, p).score(t))
        score = np.asarray(scored(params, tokens))
        if case.dtype == "float64" and shape.compression is None:  # which compresses other weights differently
            moved = pack(model, _scale_past_norms(shape, random_weights(shape, 0)))
            what = "what is multiplied with a normalised input, and nothing else, is in `reads_norm`"
            close(scored(moved, tokens), score, case.tolerance, what)
        prefill = jax.jit(lambda p, c, t, start, length: bind(model, p).prefill(c, t, start, length))
        step = jax.jit(lambda p, c, t, position: bind(model, p).decode_step(c, t, position))
        spec = model.cache_spec(BATCH, CAPACITY)
        empty = kv.zeros(spec)
        used = jax.tree.map(lambda s: jnp.full(s.shape, 3, s.dtype), spec)
        # None at all, a chunk to its last place, the cache to its last place, and two lengths between.
        for prompt in (0, 2 * case.chunk, CAPACITY, *rng.integers(1, CAPACITY, 2).tolist()):
            # A prefill from 0 begins a sequence, whatever is left of another in the cache.
            cache = empty if prompt == 0 else used
            for start in range(0, prompt, case.chunk):
                length = min(case.chunk, prompt - start)
                piece = rng.integers(0, 256, (BATCH, case.chunk), dtype=np.int32)  # padding may be anything
                piece[:, :length] = tokens[:, start : start + length]
                logits, cache = prefill(params, cache, piece, np.int32(start), np.int32(length))
                what = f"prefill of {length} tokens at {start}, padded to {case.chunk}, gives what score gives"
                close(logits, score[:, start + length - 1], case.tolerance, f"{what} ({case})")
            for position in range(prompt, CAPACITY):
                logits, cache = step(params, cache, tokens[:, position], np.int32(position))
                what = f"the step at {position} after a prompt of {prompt} tokens gives what score gives"
                close(logits, score[:, position], case.tolerance, f"{what} ({case})")
            same_arrays("the cache", dict(flat(spec)), dict(flat(cache)))
    return score


def _scale_past_norms(shape: DecoderShape, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same model by other weights: what reads a norm times random factors, the norm divided by them."""
    rng, moved = np.random.default_rng(3), dict(weights)
    for index, layer in enumerate(shape.layers):
        for name, block in layer.blocks():
            path = f"layers.{index}.{name}"
            factors = rng.uniform(0.5, 2, shape.width)
            moved[f"{path}_norm"] = moved[f"{path}_norm"] / factors
            for matrix in block.reads_norm:
                moved[f"{path}.{matrix}"] = moved[f"{path}.{matrix}"] * factors[:, None]
    return moved


def _check_declared(shape: DecoderShape) -> None:
    """What a block says of itself agrees with itself."""
    for layer in shape.layers:
        for name, block in layer.blocks():
            sizes = block.linears(shape.width)
            unknown = set(block.reads_norm) - sizes.keys()
            require(not unknown, f"what reads the norm are matrices of the block, not {sorted(unknown)}")
            writes = [matrix for matrix in sizes if f".{matrix}" in WRITES_RESIDUAL]
            require(bool(writes), f"{name} has a matrix that writes to the residual stream among {WRITES_RESIDUAL}")
            for matrix in writes:
                require(sizes[matrix][-1] == shape.width, f"{name}.{matrix} writes {shape.width} features")
        if layer.attention is None:
            continue
        cache, reads = layer.attention.cache(BATCH, CAPACITY), layer.attention.reads(BATCH, CAPACITY)
        for tensor in cache.keys() & reads.keys():
            fits = all(map(le, reads[tensor], cache[tensor]))
            require(fits, f"no more of {tensor} is read, {reads[tensor]}, than is kept, {cache[tensor]}")
        few, many = (layer.attention.multiplications(tokens, CAPACITY) for tokens in (1, CAPACITY))
        require(0 < few <= many, f"a step multiplies, and all of its tokens no less: {few} and {many}")


def _check_gradients(shape: DecoderShape) -> None:
    model = plain_decoder(shape)
    tokens = np.random.default_rng(2).integers(0, 256, (BATCH, 2 * CAPACITY), dtype=np.int32)

    def loss(params: Mapping[str, Any]) -> jax.Array:
        chances = jax.nn.log_softmax(bind(model, params).score(jnp.asarray(tokens[:, :-1])))
        return -jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1).mean()

    # Compiled without optimisation, which halves the time and changes nothing about what is finite.
    graded = jax.jit(jax.value_and_grad(loss), compiler_options={"xla_backend_optimization_level": 0})
    value, gradients = graded(pack(model, random_weights(shape, 0)))
    require(bool(np.isfinite(value)), f"the loss of random weights is finite, not {value}")
    for path, gradient in gradients.items():
        require(bool(np.isfinite(gradient).all()), f"gradients are finite; that of {path} is not")
