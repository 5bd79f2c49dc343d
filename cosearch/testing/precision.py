"""The contract of number formats: what is packed, multiplied and cached is as near as the format says."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cosearch.core.errors import Rejected
from cosearch.precision import CALIBRATIONS, FORMATS, Format
from cosearch.precision.quantized import Quantized
from cosearch.schedule.matmul import LAYOUTS
from cosearch.testing.common import require, same_arrays, within

_CALM = 1e3
"""Weights this near to 1, either way, every format must hold; of smaller and larger ones it may refuse to."""

_ROWS, _COLUMNS = 256, 24
"""The size of a matrix that every format must hold."""


def check_format(name: str) -> None:
    """Check the number format `name` in the roles that it says it has, matrices also over many shapes and scales."""
    form = FORMATS[name]
    if form.activations:
        dtype = jnp.dtype(name)
        require(jnp.issubdtype(dtype, jnp.floating), f"a format to compute in is named as a float dtype is, not {name}")
    unknown = {*form.calibrations} - {*CALIBRATIONS}
    require("absmax" in form.calibrations and not unknown, f"calibrations are some of {CALIBRATIONS}, with absmax")
    chosen = {*form.calibrations} & {"mse", "gptq"}
    require(not chosen or isinstance(form, Quantized), f"calibration by {sorted(chosen)} is for `Quantized` formats")
    unknown = {*form.inputs} - {*_ROUNDED}
    require(not unknown, f"inputs are rounded in ways that this check knows, {sorted(_ROUNDED)}, not {unknown}")
    # A format of no role at all is verification's own; matrices are what that needs.
    matrices = form.weights or not (form.cache or form.activations)
    wide = matrices and any(
        jnp.dtype(part.dtype).itemsize == 8 for part in form.spec(_ROWS, _COLUMNS, "in_out").values()
    )
    with jax.enable_x64(True) if wide else nullcontext():
        if matrices:
            why = form.why_not(_ROWS, _COLUMNS)
            require(why is None, f"a matrix of {_ROWS} x {_COLUMNS} is held; {why}")
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
        if why := form.why_not(rows, columns):
            refused = [_rejects(form.spec, rows, columns, layout), _rejects(form.pack, weights, layout)]
            require(all(refused), f"spec and pack raise Rejected where why_not speaks, at [{rows}, {columns}]: {why}")
            return
        at = f"at [{rows}, {columns}] in {layout}"
        absmax = np.abs(weights).max(axis=0)
        before = weights.copy()
        try:
            stored = form.pack(weights, layout)
        except Rejected:
            calm = (absmax[absmax > 0] >= 1 / _CALM).all() and (absmax <= _CALM).all()
            require(not calm, f"weights of absmax between {1 / _CALM} and {_CALM} are packed, not rejected, {at}")
            return
        require(np.array_equal(weights, before), f"pack leaves its argument as it was, {at}")
        require("values" in stored, f"pack makes a part 'values', {at}; it makes {sorted(stored)}")
        for part, array in stored.items():
            require(array.ndim == 2 and array.flags.c_contiguous, f"{part} has two axes, in C order, {at}")
        same_arrays(f"a packed part {at}", form.spec(rows, columns, layout), stored)
        back = form.unpack(stored, layout)
        require(back.shape == weights.shape and back.dtype == np.float64, f"unpack gives [in, out] in float64, {at}")
        within(np.abs(back - weights), form.bound(weights), f"unpack is within bound {at}")

    check()


def _check_scales(form: Format) -> None:
    """Weights that share a scale share it with no others, and what `bound` says is nearly reached."""
    rng = np.random.default_rng(5)
    # float64, so that float32 has something to round; one weight is the largest, for formats that look at all of them.
    weights = rng.uniform(0.1, 1, (_ROWS, _COLUMNS)) * rng.choice((-1, 1), (_ROWS, _COLUMNS))
    weights[-1, -1] = 1.5
    for layout in LAYOUTS:
        back, bound = form.unpack(form.pack(weights, layout), layout), form.bound(weights)
        require(bound.shape == weights.shape and bound.dtype == np.float64, "bound is of weights' shape, in float64")
        reached = float(np.max(np.abs(back - weights) / bound))
        require(reached > 0.6 or bool((bound < 1e-12).all()), f"bound is tight; errors reach {reached:.3g} of it")
        scales = [part.shape for name, part in form.spec(_ROWS, _COLUMNS, layout).items() if name != "values"]
        if layout == "out_in":
            scales = [shape[::-1] for shape in scales]
        rows, columns = (max(sizes) for sizes in zip(*scales, strict=True)) if scales else weights.shape
        for row, column in ((0, 0), (rows // 2, columns // 2)):
            share = np.zeros(weights.shape, bool)
            height, width = _ROWS // rows, _COLUMNS // columns
            share[row * height : (row + 1) * height, column * width : (column + 1) * width] = True
            less = form.unpack(form.pack(np.where(share, weights / 64, weights), layout), layout)
            require(
                bool((less == np.where(share, back / 64, back)).all()),
                f"the {height} x {width} weights that share a scale, made 64 times smaller, are read back 64 times "
                f"smaller, and no other changes, in {layout}",
            )


def _check_refusals(form: Format) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        weights = np.ones((_ROWS, _COLUMNS), np.float32)
        weights[2, 1] = bad
        for layout in LAYOUTS:
            refused = _rejects(form.pack, weights, layout)
            require(refused, f"a matrix with {bad} in it must raise Rejected, in {layout} too")


def _rejects(call: Callable[..., object], *arguments: Any) -> bool:
    try:
        call(*arguments)
    except Rejected:
        return True
    return False


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
            require(same, f"JAX packs what numpy packs, to the bit, {at}; {part} differs")
        matrix = form.unpack(stored, layout)
        ordered = matrix if layout == "in_out" else matrix.T
        for dtype, tolerance in (("float32", 5e-7), ("bfloat16", 2**-8)):
            whole = jax.jit(form.dequantize, static_argnums=(1, 2))(arrays, layout, dtype)
            require(whole.dtype == jnp.dtype(dtype), f"dequantize gives {dtype}, not {whole.dtype}")
            within(np.abs(np.asarray(whole, np.float64) - ordered), tolerance * np.abs(ordered), f"unpacked alike {at}")
            indices = rng.integers(0, columns, (2, 3), dtype=np.int32)
            taken = jax.jit(form.columns, static_argnums=(2, 3))(arrays, jnp.asarray(indices), layout, dtype)
            require(taken.dtype == jnp.dtype(dtype), f"columns come in {dtype}, not {taken.dtype}")
            expected = np.moveaxis(matrix[:, indices], 0, -1)
            require(taken.shape == expected.shape, f"columns are [..., in] {at}, not {taken.shape}")
            within(np.abs(np.asarray(taken, np.float64) - expected), tolerance * np.abs(expected), f"columns {at}")
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
    require(out.shape == shape and out.dtype == x.dtype, f"matmul keeps the dtype of x {at}, not {out.dtype}")
    rounded = _ROUNDED[inputs](x.astype(np.float64))
    # The sum of magnitudes is what rounding errors are relative to.
    tolerance = (1e-6 if out.dtype == np.float32 else 2**-7) * (np.abs(rounded) @ np.abs(matrix))
    within(np.abs(np.asarray(out, np.float64) - rounded @ matrix), tolerance, f"matmul is x times unpack {at}")


def _check_cache(form: Format) -> None:
    shape = (2, 3, 2, 64)
    rng = np.random.default_rng(4)
    x = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 2, (*shape[:3], 1))).astype(np.float32)
    x[1, 2] = 0
    encode, decode = jax.jit(form.encode), jax.jit(form.decode, static_argnums=1)
    stored = encode(jnp.asarray(x))
    require("values" in stored, f"encode makes a part 'values', not only {sorted(stored)}")
    for part, array in stored.items():
        require(
            array.ndim == len(shape) and array.shape[:3] == shape[:3],
            f"encode keeps every axis but the last; {part} of {shape} is {array.shape}",
        )
    back = np.asarray(decode(stored, "float32"))
    require(back.shape == shape and back.dtype == np.float32, f"decode gives {shape} in the dtype asked for")
    off, bound = np.abs(back.astype(np.float64) - x), form.cache_bound(x)
    require(bound.shape == shape and bound.dtype == np.float64, "cache_bound is of the shape of x, in float64")
    within(off, bound, "what is read back is within cache_bound")
    reached = float(np.max(off / np.where(bound > 0, bound, 1)))
    exact = bool((bound <= 2.0**-23 * np.abs(x) + 1e-30).all())  # of x in float32, formats as fine lose nothing
    require(reached > 0.6 or exact, f"cache_bound is tight; errors reach {reached:.3g} of it")
    require(bool((back[1, 2] == 0).all()), "zeros are read back as zeros")
    again = encode(jnp.asarray(back))
    for part, array in stored.items():
        same = np.asarray(array).tobytes() == np.asarray(again[part]).tobytes()
        require(same, f"what was read back is stored again without a change; {part} differs")
    less = np.ones((*shape[:3], 1), np.float32)
    less[0, 1, 1] = 1 / 64
    smaller = np.asarray(decode(encode(jnp.asarray(x * less)), "float32"))
    require(
        bool((smaller == back * less).all()),
        "one token's head, made 64 times smaller, is read back 64 times smaller, and no other changes",
    )
