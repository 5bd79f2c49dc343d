"""The contracts: what everything that is registered by name must keep, as checks that anybody can call.

`check_format("int8")` is silent where the contract is kept, and raises an AssertionError that names the rule and the
numbers where it is not. This project's own tests run each check over every registered name; a package that brings a
format or a proposer of its own calls the same check in its tests. Needs `hypothesis`, which `cosearch[dev]` installs.
"""

import json
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import chdir, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cosearch import axes
from cosearch.architecture import cache as kv
from cosearch.architecture.attention import ATTENTION
from cosearch.architecture.decoder import Decoder, bind, pack, params_spec, plain_decoder, random_weights, unpack
from cosearch.architecture.feedforward import FEEDFORWARD, FeedForwardShape
from cosearch.architecture.linear import INDICES, Linear, MatrixStorage
from cosearch.architecture.shape import DecoderShape
from cosearch.core.archive import Archive
from cosearch.core.candidate import Candidate, Choices, Value
from cosearch.core.errors import Rejected
from cosearch.core.metric import Metric, measured, predicted
from cosearch.core.problem import Constraint, Objective, Problem
from cosearch.core.registry import Registry
from cosearch.core.space import Space
from cosearch.core.target import Target
from cosearch.core.trial import Failure, Proposer, Trial
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.latency import roofline
from cosearch.precision import CALIBRATIONS, FORMATS, Format, Precision
from cosearch.proposers import PROPOSERS, Setting
from cosearch.report import TRACKERS, Budget, Comparison, Outcome, Run, Tracker
from cosearch.schedule import Schedule
from cosearch.schedule.matmul import LAYOUTS, MATMULS
from cosearch.sparsity import PATTERNS
from cosearch.targets import TARGETS, MeasurePeaks

_NONE: Mapping[str, Any] = {}

# Attention and feed-forward ------------------------------------------------------------------------------------------

_SMALL: Mapping[str, Value] = {"width": 64, "depth": 2, "head_dim": 16, "kv_heads": 2, "window": 8, "ffn_ratio": 1}
"""Choices that make a decoder small; knobs that are not named here stand at their defaults."""
_BATCH, _CAPACITY = 2, 24


@dataclass(frozen=True)
class _Case:
    """One way to run a decoder, and how nearly its steps must give what teacher forcing gives."""

    dtype: str
    tolerance: float
    chunk: int
    schedule: Schedule


_CASES = (
    _Case("float64", 1e-9, 10, Schedule()),
    _Case("float64", 1e-9, 3, Schedule("unroll", "multiply_reduce", "out_in", "multiply_reduce", "bhds")),
    _Case("float32", 1e-4, 10, Schedule(layers="unroll", cache_layout="bhsd")),
)


def check_attention(name: str, choices: Mapping[str, Value] = _NONE) -> None:
    """Check the attention variant `name` in a small decoder.

    `choices` are for knobs whose defaults do not fit a width of 64. Teacher forcing, prefill in padded chunks and
    single steps must give the same logits, whatever the schedule; what is declared must be what is there. A variant
    that cannot stand alone stands above a layer of `mha`.
    """
    try:
        DecoderShape.of(Choices({**_SMALL, "attention": name, **choices}))
        layers: Value = name
    except Rejected:
        layers = ("mha", name)
    shape = _small_shape(ATTENTION, name, {"attention": layers, **choices})
    scores = [_check_decoding(shape, case) for case in _CASES]
    _close(scores[1], scores[0], _CASES[0].tolerance, "layers unrolled and in other layouts give what one loop gives")
    _check_gradients(shape)


def check_feedforward(name: str, choices: Mapping[str, Value] = _NONE) -> None:
    """Check the feed-forward variant `name`: each token on its own, and in a small decoder as attention is checked."""
    shape = _small_shape(FEEDFORWARD, name, {"feedforward": name, **choices})
    block = shape.layers[0].feedforward
    if block is not None:
        _check_block(block, shape.width)
    _check_decoding(shape, _CASES[1])
    _check_gradients(shape)


def _check_block(block: FeedForwardShape, width: int) -> None:
    sizes = block.linears(width)
    unknown = set(block.reads_norm) - sizes.keys()
    _require(not unknown, f"what reads the norm are matrices of the block, not {sorted(unknown)}")
    for part in sizes:
        few, many = block.read_fraction(part, 1), block.read_fraction(part, 1 << 20)
        _require(0 < few <= many <= 1, f"more of {part} is read for more tokens, at most all: {few} and {many}")
    rng, storage = np.random.default_rng(0), MatrixStorage("float64")
    with jax.enable_x64(True):
        linears = {part: Linear(one, storage) for part, one in sizes.items()}
        for part, linear in linears.items():
            stored = storage.pack(rng.standard_normal(sizes[part]) / sizes[part][-2] ** 0.5)
            arrays: dict[str, Any] = {name: nnx.Param(jnp.asarray(array)) for name, array in stored.items()}
            linear.stored = nnx.Dict(arrays)
        x = jnp.asarray(rng.standard_normal((2, 5, width)))
        out = block(x, linears)
        _require(
            out.shape == x.shape and out.dtype == x.dtype,
            f"feed-forward gives what it gets, {x.shape} of {x.dtype}, not {out.shape} of {out.dtype}",
        )
        _close(block(x[1:, 3:4], linears)[0, 0], out[1, 3], 1e-9, "each token is fed forward on its own")


def _small_shape(registry: Registry[Any], name: str, choices: Mapping[str, Value]) -> DecoderShape:
    _require(name in registry, f"{name!r} is registered among {registry.names()}")
    try:
        shape, again = (DecoderShape.of(Choices({**_SMALL, **choices})) for _ in range(2))
    except Rejected as rejection:
        raise AssertionError(
            f"the {registry.kind}'s defaults must fit a small decoder, or its `choices` be given: {rejection}"
        ) from None
    _require(shape == again and hash(shape) == hash(again), "equal choices make equal, hashable shapes")
    return shape


def _check_decoding(shape: DecoderShape, case: _Case) -> np.ndarray:
    """Check that prefill and steps agree with `score`, whose logits are returned."""
    rng = np.random.default_rng(1)
    schedule = case.schedule if shape.uniform else replace(case.schedule, layers="unroll")
    with jax.enable_x64(case.dtype == "float64"):
        model = Decoder(shape, Precision(case.dtype, case.dtype, case.dtype), schedule)
        params = pack(model, random_weights(shape, 0))
        _same_arrays("a parameter", params_spec(model), params)
        tokens = rng.integers(0, 256, (_BATCH, _CAPACITY), dtype=np.int32)
        score = np.asarray(jax.jit(lambda p, t: bind(model, p).score(t))(params, tokens))
        prefill = jax.jit(lambda p, c, t, start, length: bind(model, p).prefill(c, t, start, length))
        step = jax.jit(lambda p, c, t, position: bind(model, p).decode_step(c, t, position))
        spec = model.cache_spec(_BATCH, _CAPACITY)
        # None at all, a chunk to its last place, the cache to its last place, and two lengths between.
        for prompt in (0, 2 * case.chunk, _CAPACITY, *rng.integers(1, _CAPACITY, 2).tolist()):
            cache = kv.zeros(spec)
            for start in range(0, prompt, case.chunk):
                length = min(case.chunk, prompt - start)
                piece = rng.integers(0, 256, (_BATCH, case.chunk), dtype=np.int32)  # padding may be anything
                piece[:, :length] = tokens[:, start : start + length]
                logits, cache = prefill(params, cache, piece, np.int32(start), np.int32(length))
                what = f"prefill of {length} tokens at {start}, padded to {case.chunk}, gives what score gives"
                _close(logits, score[:, start + length - 1], case.tolerance, f"{what} ({case})")
            for position in range(prompt, _CAPACITY):
                logits, cache = step(params, cache, tokens[:, position], np.int32(position))
                what = f"the step at {position} after a prompt of {prompt} tokens gives what score gives"
                _close(logits, score[:, position], case.tolerance, f"{what} ({case})")
            _same_arrays("the cache", dict(_flat(spec)), dict(_flat(cache)))
    return score


def _check_gradients(shape: DecoderShape) -> None:
    model = plain_decoder(shape)
    tokens = np.random.default_rng(2).integers(0, 256, (_BATCH, 2 * _CAPACITY), dtype=np.int32)

    def loss(params: Mapping[str, Any]) -> jax.Array:
        chances = jax.nn.log_softmax(bind(model, params).score(jnp.asarray(tokens[:, :-1])))
        return -jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1).mean()

    # Compiled without optimisation, which halves the time and changes nothing about what is finite.
    graded = jax.jit(jax.value_and_grad(loss), compiler_options={"xla_backend_optimization_level": 0})
    value, gradients = graded(pack(model, random_weights(shape, 0)))
    _require(bool(np.isfinite(value)), f"the loss of random weights is finite, not {value}")
    for path, gradient in gradients.items():
        _require(bool(np.isfinite(gradient).all()), f"gradients are finite; that of {path} is not")


# Number formats ------------------------------------------------------------------------------------------------------

_CALM = 1e3
"""Weights this near to 1, either way, every format must hold; of smaller and larger ones it may refuse to."""

_ROWS, _COLUMNS = 256, 24
"""The size of a matrix that every format must hold."""


def check_format(name: str) -> None:
    """Check the number format `name` in the roles that it says it has, matrices also over many shapes and scales."""
    form = FORMATS[name]
    if form.activations:
        dtype = jnp.dtype(name)
        _require(
            jnp.issubdtype(dtype, jnp.floating), f"a format to compute in is named as a float dtype is, not {name}"
        )
    unknown = {*form.calibrations} - {*CALIBRATIONS}
    _require("absmax" in form.calibrations and not unknown, f"calibrations are some of {CALIBRATIONS}, with absmax")
    unknown = {*form.inputs} - {*_ROUNDED}
    _require(not unknown, f"inputs are rounded in ways that this check knows, {sorted(_ROUNDED)}, not {unknown}")
    # A format of no role at all is verification's own; matrices are what that needs.
    matrices = form.weights or not (form.cache or form.activations)
    wide = matrices and any(
        jnp.dtype(part.dtype).itemsize == 8 for part in form.spec(_ROWS, _COLUMNS, "in_out").values()
    )
    with jax.enable_x64(True) if wide else nullcontext():
        if matrices:
            why = form.why_not(_ROWS, _COLUMNS)
            _require(why is None, f"a matrix of {_ROWS} x {_COLUMNS} is held; {why}")
            _check_packing(form)
            _check_scales(form)
            _check_refusals(form)
            _check_products(form)
        if form.cache:
            _check_cache(form)


@st.composite
def _matrices(draw: st.DrawFn) -> np.ndarray:
    """Float32 matrices [in, out] of all shapes, each column of its own scale, some of them zero."""
    rows = draw(st.one_of(st.integers(1, 40), st.sampled_from((16, 32, 48, 64, 96, 128, 256, 384))))
    columns = draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = sorted(draw(st.tuples(st.floats(-6, 6), st.floats(-6, 6))))
    exponents = rng.uniform(low, high + 0.0, columns)  # of 0.0 to -0.0, NumPy draws nothing
    zero = rng.random(columns) < draw(st.sampled_from((0.0, 0.3, 1.0)))
    return (rng.uniform(-1, 1, (rows, columns)) * np.where(zero, 0.0, 10.0**exponents)).astype(np.float32)


def _check_packing(form: Format) -> None:
    # On a busy machine drawing is slow, which is no fault of the format's; and one broken rule is enough to tell.
    @settings(
        max_examples=100,
        deadline=None,
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(_matrices(), st.sampled_from(LAYOUTS))
    def check(weights: np.ndarray, layout: str) -> None:
        rows, columns = weights.shape
        if form.why_not(rows, columns):
            return
        at = f"at [{rows}, {columns}] in {layout}"
        absmax = np.abs(weights).max(axis=0)
        before = weights.copy()
        try:
            stored = form.pack(weights, layout)
        except Rejected:
            calm = (absmax[absmax > 0] >= 1 / _CALM).all() and (absmax <= _CALM).all()
            _require(not calm, f"weights of absmax between {1 / _CALM} and {_CALM} are packed, not rejected, {at}")
            return
        _require(np.array_equal(weights, before), f"pack leaves its argument as it was, {at}")
        _require("values" in stored, f"pack makes a part 'values', {at}; it makes {sorted(stored)}")
        for part, array in stored.items():
            _require(array.ndim == 2 and array.flags.c_contiguous, f"{part} has two axes, in C order, {at}")
        _same_arrays(f"a packed part {at}", form.spec(rows, columns, layout), stored)
        said, made = form.bits_per_weight(rows, columns) * weights.size / 8, sum(map(_bytes, stored.values()))
        _require(abs(said - made) <= 0.01 * made, f"bits_per_weight are the bits packed, {at}: {said} and {made} bytes")
        back = form.unpack(stored, layout)
        _require(back.shape == weights.shape and back.dtype == np.float64, f"unpack gives [in, out] in float64, {at}")
        _within(np.abs(back - weights), form.bound(weights), f"unpack is within bound {at}")

    check()


def _check_scales(form: Format) -> None:
    """Weights that share a scale share it with no others, and what `bound` says is nearly reached."""
    rng = np.random.default_rng(5)
    # float64, so that float32 has something to round; one weight is the largest, for formats that look at all of them.
    weights = rng.uniform(0.1, 1, (_ROWS, _COLUMNS)) * rng.choice((-1, 1), (_ROWS, _COLUMNS))
    weights[-1, -1] = 1.5
    for layout in LAYOUTS:
        back, bound = form.unpack(form.pack(weights, layout), layout), form.bound(weights)
        _require(bound.shape == weights.shape and bound.dtype == np.float64, "bound is of weights' shape, in float64")
        reached = float(np.max(np.abs(back - weights) / bound))
        _require(reached > 0.6 or bool((bound < 1e-12).all()), f"bound is tight; errors reach {reached:.3g} of it")
        scales = [part.shape for name, part in form.spec(_ROWS, _COLUMNS, layout).items() if name != "values"]
        if layout == "out_in":
            scales = [shape[::-1] for shape in scales]
        rows, columns = (max(sizes) for sizes in zip(*scales, strict=True)) if scales else weights.shape
        for row, column in ((0, 0), (rows // 2, columns // 2)):
            share = np.zeros(weights.shape, bool)
            height, width = _ROWS // rows, _COLUMNS // columns
            share[row * height : (row + 1) * height, column * width : (column + 1) * width] = True
            less = form.unpack(form.pack(np.where(share, weights / 64, weights), layout), layout)
            _require(
                bool((less == np.where(share, back / 64, back)).all()),
                f"the {height} x {width} weights that share a scale, made 64 times smaller, are read back 64 times "
                f"smaller, and no other changes, in {layout}",
            )


def _check_refusals(form: Format) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        weights = np.ones((_ROWS, _COLUMNS), np.float32)
        weights[2, 1] = bad
        for layout in LAYOUTS:
            try:
                form.pack(weights, layout)
            except Rejected:
                continue
            raise AssertionError(f"a matrix with {bad} in it must raise Rejected, in {layout} too")


def _check_products(form: Format) -> None:
    rng = np.random.default_rng(3)
    for rows, columns, layout, lowering in (
        (_ROWS, _COLUMNS, "in_out", "dot"),
        (_ROWS, _COLUMNS, "in_out", "multiply_reduce"),
        (_ROWS, _COLUMNS, "out_in", "dot"),
        (_ROWS, _COLUMNS, "out_in", "multiply_reduce"),
        (33, 7, "in_out", "multiply_reduce"),
        (33, 7, "out_in", "dot"),
    ):
        if form.why_not(rows, columns):
            continue
        at = f"of [{rows}, {columns}] in {layout}"
        # Rows of different sizes, so that a scale of the wrong group is far off.
        weights = (rng.standard_normal((rows, columns)) * 4.0 ** rng.uniform(-2, 2, (rows, 1))).astype(np.float32)
        stored = form.pack(weights, layout)
        arrays = {part: jnp.asarray(array) for part, array in stored.items()}
        traced = jax.jit(form.pack, static_argnums=1)(jnp.asarray(weights), layout)
        for part, array in stored.items():
            same = array.tobytes() == np.asarray(traced[part]).tobytes()
            _require(same, f"JAX packs what numpy packs, to the bit, {at}; {part} differs")
        matrix = form.unpack(stored, layout)
        ordered = matrix if layout == "in_out" else matrix.T
        for dtype, tolerance in (("float32", 5e-7), ("bfloat16", 2**-8)):
            whole = jax.jit(form.dequantize, static_argnums=(1, 2))(arrays, layout, dtype)
            _require(whole.dtype == jnp.dtype(dtype), f"dequantize gives {dtype}, not {whole.dtype}")
            _within(
                np.abs(np.asarray(whole, np.float64) - ordered), tolerance * np.abs(ordered), f"unpacked alike {at}"
            )
            indices = rng.integers(0, columns, (2, 3), dtype=np.int32)
            taken = jax.jit(form.columns, static_argnums=(2, 3))(arrays, jnp.asarray(indices), layout, dtype)
            _require(taken.dtype == jnp.dtype(dtype), f"columns come in {dtype}, not {taken.dtype}")
            expected = np.moveaxis(matrix[:, indices], 0, -1)
            _require(taken.shape == expected.shape, f"columns are [..., in] {at}, not {taken.shape}")
            _within(np.abs(np.asarray(taken, np.float64) - expected), tolerance * np.abs(expected), f"columns {at}")
        # One row and many: a lowering may treat them differently.
        for lead, dtype in (((1,), np.float32), ((2, 9), np.float32), ((3,), jnp.bfloat16)):
            x = rng.standard_normal((*lead, rows)).astype(dtype)
            x[..., -1, :] *= x.size > rows  # a token of zeros, if there are others
            for inputs in ("as_is", *form.inputs):
                _check_product(form, x, arrays, matrix, layout, lowering, inputs)


def _round_to_int8(x: np.ndarray) -> np.ndarray:
    step = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.rint(x / np.where(step > 0, step, 1)) * step


def _round_to_float8_e4m3(x: np.ndarray) -> np.ndarray:
    step = np.abs(x).max(axis=-1, keepdims=True) / 448
    scaled = (x / np.where(step > 0, step, 1)).clip(-448, 448)
    return scaled.astype(jnp.float8_e4m3fn).astype(np.float64) * step


_ROUNDED = {"as_is": np.asarray, "int8": _round_to_int8, "float8_e4m3": _round_to_float8_e4m3}
"""What inputs of products in float64 are rounded to, by token."""


def _check_product(
    form: Format,
    x: np.ndarray,
    arrays: Mapping[str, jax.Array],
    matrix: np.ndarray,
    layout: str,
    lowering: str,
    inputs: str,
) -> None:
    out = jax.jit(form.matmul, static_argnums=(2, 3, 4))(jnp.asarray(x), arrays, layout, lowering, inputs)
    at = f"for {x.shape} of {x.dtype} ({inputs}) by {matrix.shape} in {layout} by {lowering}"
    shape = (*x.shape[:-1], matrix.shape[1])
    _require(out.shape == shape and out.dtype == x.dtype, f"matmul keeps the dtype of x {at}, not {out.dtype}")
    rounded = _ROUNDED[inputs](x.astype(np.float64))
    # The sum of magnitudes is what rounding errors are relative to.
    tolerance = (1e-6 if out.dtype == np.float32 else 2**-7) * (np.abs(rounded) @ np.abs(matrix))
    _within(np.abs(np.asarray(out, np.float64) - rounded @ matrix), tolerance, f"matmul is x times unpack {at}")


def _check_cache(form: Format) -> None:
    shape = (2, 3, 2, 64)
    rng = np.random.default_rng(4)
    x = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 2, (*shape[:3], 1))).astype(np.float32)
    x[1, 2] = 0
    encode, decode = jax.jit(form.encode), jax.jit(form.decode, static_argnums=1)
    stored = encode(jnp.asarray(x))
    _require("values" in stored, f"encode makes a part 'values', not only {sorted(stored)}")
    for part, array in stored.items():
        _require(
            array.ndim == len(shape) and array.shape[:3] == shape[:3],
            f"encode keeps every axis but the last; {part} of {shape} is {array.shape}",
        )
    back = np.asarray(decode(stored, "float32"))
    _require(back.shape == shape and back.dtype == np.float32, f"decode gives {shape} in the dtype asked for")
    off, bound = np.abs(back.astype(np.float64) - x), form.cache_bound(x)
    _require(bound.shape == shape and bound.dtype == np.float64, "cache_bound is of the shape of x, in float64")
    _within(off, bound, "what is read back is within cache_bound")
    reached = float(np.max(off / np.where(bound > 0, bound, 1)))
    exact = bool((bound <= 2.0**-23 * np.abs(x) + 1e-30).all())  # of x in float32, formats as fine lose nothing
    _require(reached > 0.6 or exact, f"cache_bound is tight; errors reach {reached:.3g} of it")
    _require(bool((back[1, 2] == 0).all()), "zeros are read back as zeros")
    again = encode(jnp.asarray(back))
    for part, array in stored.items():
        same = np.asarray(array).tobytes() == np.asarray(again[part]).tobytes()
        _require(same, f"what was read back is stored again without a change; {part} differs")
    less = np.ones((*shape[:3], 1), np.float32)
    less[0, 1, 1] = 1 / 64
    smaller = np.asarray(decode(encode(jnp.asarray(x * less)), "float32"))
    _require(
        bool((smaller == back * less).all()),
        "one token's head, made 64 times smaller, is read back 64 times smaller, and no other changes",
    )


def _bytes(array: np.ndarray) -> float:
    """Bytes on the device, where numbers of 4 bits share one; in numpy each has its own."""
    kind = jnp.iinfo if jnp.issubdtype(array.dtype, jnp.integer) else jnp.finfo
    return array.size * kind(array.dtype).bits / 8


# Sparsity patterns ---------------------------------------------------------------------------------------------------


def check_pattern(name: str, choices: Mapping[str, Value] = _NONE) -> None:
    """Check the sparsity pattern `name` on small decoders: what it says is left is what it leaves, and that runs.

    `choices` replace defaults of its knobs. It may reject some architectures, but not all of the plain ones. What it
    leaves out of a matrix that it compresses must be zero in what `prune` gives, and only that must be lost.
    """
    pattern = PATTERNS[name]
    defaults = {knob: declared.default for knob, declared in pattern.knobs.items()}
    chosen = {**defaults, **choices, "pattern": name}
    last, reasons = None, []
    for attention in ("mha", "gqa", "mqa"):
        dense = DecoderShape.of(Choices({**_SMALL, "attention": attention}))
        try:
            shape = pattern.shape(dense, chosen)
        except Rejected as rejection:
            reasons.append(str(rejection))
            continue
        weights, moments = random_weights(dense, 5), random_moments(dense)
        before, observed = _copied(weights), _copied(moments)
        pruned, again = (pattern.prune(weights, dense, chosen, moments) for _ in range(2))
        _equal_weights(weights, before, "prune leaves the weights that it is given as they were")
        _equal_weights(moments, observed, "prune leaves the moments that it is given as they were")
        _equal_weights(pruned, again, "prune gives the same twice")
        if not pattern.needs_moments(chosen):
            blind = pattern.prune(weights, dense, chosen, {})
            _equal_weights(pruned, blind, "prune reads no moments where it says that it needs none")
        sizes = {**shape.linears(), **{path: array.shape for path, array in shape.vectors().items()}}
        made = {path: array.shape for path, array in pruned.items()}
        _require(made == sizes, f"prune leaves what shape says, {attention}: {_difference(sizes, made)}")
        _require(
            shape.parameters <= dense.parameters, f"not more is left than there was, {attention}: {shape.parameters}"
        )
        model = plain_decoder(shape)
        params = pack(model, pruned)
        _same_arrays("a parameter of the pruned decoder", params_spec(model), params)
        stored = sum(array.size for path, array in params.items() if not path.endswith(INDICES))
        _require(stored == shape.parameters, f"parameters are what is stored, {shape.parameters}, not {stored}")
        for path, array in unpack(model, params).items():
            _require(np.array_equal(array, pruned[path]), f"what is stored of {path} is what prune leaves of it")
        last = shape, pruned
    if last is None:
        raise AssertionError(f"one of mha, gqa and mqa must be prunable with {chosen}: {reasons}")
    shape, pruned = last
    for path in {sizes: path for path, sizes in shape.linears().items() if shape.compression_of(path)}.values():
        for layout in LAYOUTS:
            _check_compressed(pruned[path], MatrixStorage(layout=layout, compression=shape.compression_of(path)))
    _check_decoding(shape, _CASES[1])


def random_moments(shape: DecoderShape) -> dict[str, np.ndarray]:
    """What might be the second moments of all matrices' inputs: those of inputs that correlate."""
    rng, found = np.random.default_rng(7), {}
    for path, (*stack, rows, _) in shape.linears().items():
        inputs = rng.standard_normal((*stack, 2 * rows, rows)) @ rng.standard_normal((rows, rows))
        found[path] = inputs.swapaxes(-1, -2) @ inputs / (2 * rows)
    return found


def _check_compressed(matrix: np.ndarray, storage: MatrixStorage) -> None:
    """Check a pruned matrix [in, out] in float32, alone and in a stack: what is stored of it, and its products."""
    at = f"of {matrix.shape} in {storage.layout}"
    why = storage.why_not(matrix.shape)
    _require(why is None, f"a matrix {at} that is pruned for it can be compressed, and not so: {why}")
    stored = storage.pack(matrix)
    _same_arrays(f"a part {at}", storage.spec(matrix.shape), stored)
    _require(np.array_equal(storage.unpack(stored, matrix.shape), matrix), f"compressing loses nothing {at}")
    said, made = storage.bits(matrix.shape), 8 * sum(map(_bytes, stored.values()))
    _require(said == made, f"the bits that a compressed matrix is said to need are those stored {at}: {said}, {made}")
    rng = np.random.default_rng(8)
    xs = [
        rng.standard_normal((rows, len(matrix))).astype(dtype)
        for rows in (1, 40)
        for dtype in (np.float32, jnp.bfloat16)
    ]
    for lowering in MATMULS:
        storage = replace(storage, lowering=lowering)
        one, stack = _linear(matrix, storage), _linear(np.stack([matrix, -2 * matrix]), storage)
        # All in one program, for compiling is what takes the time here.
        outs = jax.jit(lambda *xs, one=one, stack=stack: [(one(x), stack.select(jnp.int32(1), x)) for x in xs])(*xs)
        for x, pair in zip(xs, outs, strict=True):
            by = f"{at} by {lowering}, for {len(x)} rows of {x.dtype}"
            for out, factor in zip(pair, (1, -2), strict=True):
                _require(out.dtype == x.dtype, f"a product keeps the dtype of x {by}, not {out.dtype}")
                tolerance, expected = 1e-5 if x.dtype == np.float32 else 2e-2, factor * (x.astype(np.float64) @ matrix)
                _close(out, expected, tolerance, f"a product from the compressed form is that with the matrix {by}")


def _linear(matrix: np.ndarray, storage: MatrixStorage) -> Linear:
    linear = Linear(matrix.shape, storage)
    for part, array in storage.pack(matrix).items():
        linear.stored[part] = nnx.Param(jnp.asarray(array))
    return linear


def _copied(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {path: array.copy() for path, array in arrays.items()}


def _equal_weights(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], rule: str) -> None:
    same = a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)
    _require(same, rule)


# Proposers -----------------------------------------------------------------------------------------------------------

_KNOBS: Mapping[str, Sequence[Any]] = {
    "architecture.width": [32, 64],
    "architecture.depth": [1, 2],
    "architecture.head_dim": [16],
    "architecture.attention": ["mha", "gqa", "sliding_window"],
    "architecture.kv_heads": [1, 2],
    "architecture.window": [8, 16],
    "precision.weights": ["float32", "bfloat16", "int8"],
    "sparsity.pattern": ["dense", "structured"],
    "schedule.layers": ["scan", "unroll"],
    "schedule.cache_layout": ["bshd", "bhsd", "bhds"],
}
_THREE: Mapping[str, Sequence[Any]] = {
    "architecture.width": [32],
    "architecture.depth": [1],
    "architecture.head_dim": [16],
    "schedule.cache_layout": ["bshd", "bhsd", "bhds"],
}
_ASKS = 40
"""Asks after which a space of three points must be exhausted."""


def check_proposer(name: str, options: Mapping[str, Any] = _NONE) -> None:
    """Check the proposer `name`: legal candidates, each once, the same for a seed, whatever it is told."""
    space, problem = small_space(_KNOBS), small_problem()

    def make(seed: int) -> Proposer:
        return PROPOSERS[name](Setting(space, problem, seed, options))

    first, same = (_asked(make(7), space, (1, 7, 0, 12), set()) for _ in range(2))
    _require(
        len(first) == 20, f"a space of hundreds of points gives 20 candidates when asked for them, not {len(first)}"
    )
    _require(
        [candidate.uid for candidate in first] == [candidate.uid for candidate in same],
        "equal seeds give the same first 20 candidates",
    )

    proposer, known = make(8), {space.reference.uid}
    proposer.tell([])
    proposer.tell([_trial(space.reference, problem)])
    archive = [_trial(space.reference, problem)]
    for kind in ("failed", "infeasible", "perfect", "incomplete", "", ""):
        asked = _asked(proposer, space, (4,), known)
        told = [_trial(candidate, problem, kind) for candidate in asked]
        proposer.tell(told)
        archive += told
        known |= {trial.uid for trial in told}
        _require(len(asked) > 0, f"told of trials, it proposes more; after {len(archive)} trials it proposes nothing")

    resumed = make(8)
    resumed.tell(archive)
    _require(
        len(_asked(resumed, space, (8, 8), set(known))) > 0, "told of an archive, it proposes what is not in there yet"
    )
    _check_exhaustion(name, options, problem)


def _check_exhaustion(name: str, options: Mapping[str, Any], problem: Problem) -> None:
    space = small_space(_THREE)
    proposer = PROPOSERS[name](Setting(space, problem, 9, options))
    proposer.tell([_trial(space.reference, problem)])
    known = {space.reference.uid}
    for _ in range(_ASKS):
        if len(known) == 3:
            break
        asked = _asked(proposer, space, (4,), known)
        proposer.tell([_trial(candidate, problem) for candidate in asked])
        known |= {candidate.uid for candidate in asked}
    _require(len(known) == 3, f"all of a space of 3 points is found in {_ASKS} asks, not {len(known)} points")
    _require(len(proposer.ask(4)) == 0, "an exhausted space gives no candidates")


def _asked(proposer: Proposer, space: Space, counts: Sequence[int], known: set[str]) -> list[Candidate]:
    """Ask for so many at a time; all must be legal, and neither among `known` nor asked twice."""
    found: list[Candidate] = []
    for count in counts:
        candidates = list(proposer.ask(count))
        _require(len(candidates) <= count, f"asked for {count}, it gives no more, not {len(candidates)}")
        for candidate in candidates:
            point = candidate.point
            _require(space.canonical(point) == point, f"candidates are canonical; this has inactive knobs: {point}")
            why = space.why_invalid(point)
            _require(why is None, f"candidates are legal; this is not: {why}")
            first = {knob: values[0] for knob, values in space.knobs.items()}
            missing = set(space.canonical(first | point)) - point.keys()
            _require(not missing, f"candidates have all their active knobs; {sorted(missing)} are missing")
            for knob, value in point.items():
                _require(value in space.knobs[knob], f"values are the space's own, not {knob}={value!r}")
            uids = known | {one.uid for one in found}
            _require(candidate.uid not in uids, f"no candidate is proposed twice, nor one it was told of: {point}")
            found.append(candidate)
    return found


def small_space(knobs: Mapping[str, Sequence[Any]]) -> Space:
    """A space of these knobs, with the axes' own conditions and rules; its reference takes each knob's first value."""
    reference = {knob: values[0] for knob, values in knobs.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.yaml"
        path.write_text(yaml.safe_dump({"knobs": {k: list(v) for k, v in knobs.items()}, "reference": reference}))
        return axes.load_space(str(path))


def small_problem() -> Problem:
    """Latency, memory and quality on a made-up processor."""
    return Problem(
        Target("chip", "cpu", "made up", {"float32": 1e11}, 1e10, 1 << 34, 2, 1e-6),
        Workload("short", (OperatingPoint("decode", 1, 32),)),
        (Objective.parse("minimize latency_s"), Objective.parse("minimize bits_per_byte")),
        (Constraint.parse("recall_accuracy >= 0.5 * reference"),),
    )


def _trial(candidate: Candidate, problem: Problem, kind: str = "") -> Trial:
    """A made-up trial: by the roofline and a draw that depends on the candidate only; or one of some awkward kind."""
    factor = 1 + random.Random(candidate.uid).random()
    latency = factor * roofline.latency_s(candidate, problem.workload, problem.target)
    values = {
        "latency_s": latency,
        "memory_bytes": 1e6 * factor,
        "bits_per_byte": 2.0 + factor,
        "recall_accuracy": 0.0 if kind == "infeasible" else 0.8,
    }
    if kind == "perfect":
        values = {"latency_s": 1e-12, "memory_bytes": 1.0, "bits_per_byte": 1e-6, "recall_accuracy": 1.0}
    if kind == "incomplete":
        del values["bits_per_byte"], values["recall_accuracy"]
    metrics: dict[str, Metric] = {name: measured(name, value) for name, value in values.items()}
    return Trial(
        candidate,
        latency_key=candidate.uid,
        quality_key=candidate.quality_axes_key,
        metrics={} if kind == "failed" else metrics,
        failure=Failure("compile", "made to fail") if kind == "failed" else None,
        seconds={"compile": 1.0} if kind == "failed" else {"compile": 1.0, "quality": 10.0},
    )


# Trackers ------------------------------------------------------------------------------------------------------------

_HOSTILE = "<script>alert(1)</script>[bold red]x[/]\x1b]0;owned\x07\n../$page {0} %s :smile: \N{SNOWMAN}"


def check_tracker(name: str, folder: Path) -> None:
    """Check the tracker `name` on two runs under the empty `folder`: one of hostile names, one with no trial at all.

    It must raise nothing, also where it is finished twice, and write nowhere but in the run's folder.
    """
    space, problem = small_space(_KNOBS), small_problem()
    problem = replace(
        problem, target=replace(problem.target, name=_HOSTILE), workload=replace(problem.workload, name=_HOSTILE)
    )
    strange = Candidate.from_point({**space.reference.point, "architecture.attention": _HOSTILE})
    candidates = [space.reference, strange, *_drawn(space, 4)]
    kinds = ("", "", "failed", "infeasible", "incomplete", "perfect")
    # The figures are those of a candidate that has sizes; the name is what is strange.
    made = [
        _trial(space.reference if one is strange else one, problem, kind)
        for one, kind in zip(candidates, kinds, strict=True)
    ]
    trials = [_strange(trial, candidate) for trial, candidate in zip(made, candidates, strict=True)]
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(parents=True)
    with chdir(elsewhere):
        for index, some in enumerate((trials, [])):
            run = Run(folder / f"run {index}", _HOSTILE, problem, replace(space, name=_HOSTILE), Budget(9, 60.0))
            run.folder.mkdir()
            archive = Archive(run.folder / "trials.db", problem, space.reference.uid)
            _watch(TRACKERS[name](run), archive, some, _outcome(run, some))
            archive.close()
    written = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path != elsewhere}
    _require(written == {"run 0", "run 1"}, f"files are written to the run's folder only, not to {sorted(written)}")


def _watch(tracker: Tracker, archive: Archive, trials: Sequence[Trial], outcome: Outcome) -> None:
    tracker.start(archive)
    for trial in trials:
        for fraction in (0.0, 0.5, 1.0):
            tracker.progress("measure", _HOSTILE, fraction)
        archive.append(trial)
        tracker.log(trial, archive)
    for _ in range(2):
        tracker.finish(archive, outcome)


def _outcome(run: Run, trials: Sequence[Trial]) -> Outcome:
    if not trials:
        return Outcome()
    uid = trials[0].uid
    folder = run.folder / "artifacts" / uid
    folder.mkdir(parents=True)
    compared = Comparison(uid, trials[1].uid, 1e-3, 2e-3, 2.0, (1.9, 2.1), (1e-3,) * 3, (2e-3,) * 3)
    return Outcome({uid: folder}, compared)


def _drawn(space: Space, count: int) -> list[Candidate]:
    rng, found = random.Random(10), {}
    while len(found) < count:
        candidate = space.sample(rng)
        if candidate != space.reference:
            found[candidate.uid] = candidate
    return list(found.values())


def _strange(trial: Trial, candidate: Candidate) -> Trial:
    latency = trial.metrics.get("latency_s")
    return replace(
        trial,
        candidate=candidate,
        failure=trial.failure and Failure("compile", _HOSTILE),
        predictions={"latency_s": predicted("latency_s", 0.9 * latency.value, (0.5 * latency.value, latency.value))}
        if latency
        else {},
        fingerprint={"processor": _HOSTILE, "cores": 2},
    )


# Targets -------------------------------------------------------------------------------------------------------------


def check_target(name: str, folder: Path, measure_peaks: MeasurePeaks) -> None:
    """Check the target `name`, with `folder` as the cache and `measure_peaks` for what it may want to be measured."""
    calls: list[int] = []

    def counted() -> Mapping[str, Any]:
        calls.append(1)
        return measure_peaks()

    target = TARGETS[name].target(folder, counted)
    _require(target.name == name, f"a target bears its registered name {name!r}, not {target.name!r}")
    _require(bool(target.platform and target.source), "a target names JAX's platform, and the source of its figures")
    _require(bool(target.peak_flops_per_s), "a target has a peak for one dtype at least")
    for dtype in target.peak_flops_per_s:
        jnp.dtype(dtype)
    figures = {f"peak_flops_per_s of {dtype}": peak for dtype, peak in target.peak_flops_per_s.items()} | {
        field: getattr(target, field) for field in ("bandwidth_bytes_per_s", "capacity_bytes", "cores", "overhead_s")
    }
    for what, figure in figures.items():
        _require(math.isfinite(figure) and figure > 0, f"{what} is finite and above 0, not {figure}")
    read = Target.from_json(json.loads(json.dumps(target.to_json(), allow_nan=False)))
    _require(read == target, f"a target survives JSON: {target} and {read}")
    _require(TARGETS[name].target(folder, counted) == target, "a target is the same when it is asked for again")
    _require(len(calls) <= 1, f"peaks are measured once and kept, not measured {len(calls)} times")


# Common --------------------------------------------------------------------------------------------------------------


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise AssertionError(rule)


def _close(found: Any, expected: Any, tolerance: float, rule: str) -> None:
    """Within `tolerance` of the largest magnitude that is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    _require(found.shape == expected.shape, f"{rule}: shapes {found.shape} and {expected.shape}")
    error = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
    _require(error <= tolerance, f"{rule}: relative error {error:.3g}, allowed {tolerance:.3g}")


def _within(off: np.ndarray, bound: np.ndarray, rule: str) -> None:
    """Each error within its own bound."""
    worst = float(np.max(off / np.where(bound > 0, bound, 1e-300)))
    _require(bool((off <= bound).all()), f"{rule}; off by {worst:.3g} bounds")


def _same_arrays(what: str, spec: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    said = {path: (tuple(one.shape), jnp.dtype(one.dtype).name) for path, one in spec.items()}
    made = {path: (tuple(one.shape), jnp.dtype(one.dtype).name) for path, one in arrays.items()}
    _require(said == made, f"{what} is as its spec says: {_difference(said, made)}")


def _difference(said: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*said, *made}) if said.get(name) != made.get(name)]
    return "; ".join(f"{name} is said to be {said.get(name)} and is {made.get(name)}" for name in names[:3])


def _flat(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
