"""Formats with scales: a value is stored as a code, times a scale that a group of rows, or a whole column, shares.

`Quantized` is a format made of a `Code` (`codes.py`: how a value that was divided by its scale becomes bits and back)
and a `Scale` (`scales.py`: how scales are chosen and stored), and a format's file is little more than naming them. The
same lines run on arrays of numpy and on traced ones of JAX and give the same bits of float32 weights. A scale of 0
makes zeros. NaN and infinities have no place in any of these formats: arrays of numpy that hold them are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosearch.core.errors import Rejected
from cosearch.precision import Stored, refuse_not_finite
from cosearch.precision.codes import FLOAT8, INT8, Code
from cosearch.precision.scales import FLOAT32, Scale
from cosearch.schedule.matmul import MOST_ROWS, contract, multiply_reduce, take_columns


@dataclass(frozen=True)
class Quantized:
    """Codes times scales.

    A matrix has a scale for every `group` rows of each column (None: for the whole column), stored as `scale` says;
    a KV cache, one for each token and head, as `cache_scale` says. Without the one it holds no weights, without the
    other no cache. Parts of a matrix (by the layout "in_out"; transposed by "out_in"):

        values [in, out], or [in / 2, out] for codes of 4 bits: inside a group of g rows, byte k holds row k in its low
            nibble and row k + g / 2 in its high one, as llama.cpp's Q4_0 does
        scale [G, out], and what else `scale` stores
    """

    code: Code
    group: int | None = None
    scale: Scale | None = None
    cache_scale: Scale | None = None
    inputs: tuple[str, ...] = ()
    calibrations: tuple[str, ...] = ("absmax",)
    activations = False

    @property
    def weights(self) -> bool:
        return self.scale is not None

    @property
    def cache(self) -> bool:
        return self.cache_scale is not None

    def why_not(self, rows: int, columns: int) -> str | None:
        if rows % (self.group or 1):
            return f"groups of {self.group} do not divide {rows} rows"
        if rows % self.code.per_byte:
            return f"two values share a byte, and {rows} rows are odd"
        return None

    def spec(self, rows: int, columns: int, layout: str) -> dict[str, jax.ShapeDtypeStruct]:
        def order(first: int) -> tuple[int, int]:
            return (first, columns) if layout == "in_out" else (columns, first)

        self._refuse(rows, columns)
        values = jax.ShapeDtypeStruct(order(rows // self.code.per_byte), self.code.dtype)
        return {"values": values} | self._weight_scale().spec(order(self._groups(rows)))

    def pack(self, weights: Any, layout: str, scale: Any | None = None) -> dict[str, Any]:
        """`scale` is [G, out], whatever the layout, and is rounded to what can be stored."""
        self._refuse(*weights.shape)
        refuse_not_finite(weights)
        groups = self._groups(len(weights))
        if layout == "out_in":
            weights, scale = weights.T, None if scale is None else scale.T
        parts = self._quantize(weights, _axis(layout), groups, self._weight_scale(), scale)
        return {part: array.copy() for part, array in parts.items()}  # in C order, for numpy keeps that of `weights`

    def absmax_scale(self, weights: Any) -> Any:
        """The scales [G, out] that `pack` takes if it is given none, before they are rounded."""
        tiles = _split(weights, 0, self._groups(len(weights)))
        return self._weight_scale().choose(abs(tiles).max(axis=1), self.code.limit)

    def unpack(self, stored: Stored, layout: str) -> np.ndarray:
        parts = {part: np.asarray(array) for part, array in stored.items()}
        scale = self._weight_scale().load(parts, np.float64)
        matrix = self._restore(parts["values"], scale, _axis(layout), np.float64)
        return matrix if layout == "in_out" else matrix.T

    def bound(self, weights: np.ndarray) -> np.ndarray:
        return self._bound(weights, 0, self._groups(len(weights)), self._weight_scale())

    def dequantize(self, stored: Stored, layout: str, dtype: Any) -> jax.Array:
        scale = self._weight_scale().load(stored, _wide(dtype))
        return self._restore(stored["values"], scale, _axis(layout), dtype)

    def matmul(self, x: jax.Array, stored: Stored, layout: str, lowering: str, inputs: str) -> jax.Array:
        wide = _wide(x.dtype)
        scale = self._weight_scale().load(stored, wide)
        few = lowering == "multiply_reduce" and x.size // x.shape[-1] <= MOST_ROWS
        if inputs == "as_is":
            if self._of_bytes():
                product = contract(x, stored["values"], layout, lowering, out_dtype=wide) * scale.reshape(-1)
            elif few:
                product = self._by_groups(x, stored["values"], scale, layout, few)
            else:
                product = contract(x, self.dequantize(stored, layout, x.dtype), layout, lowering, out_dtype=wide)
            return product.astype(x.dtype)
        token = INPUTS[inputs].encode(x)
        rounded = token["values"]
        if not jnp.issubdtype(rounded.dtype, jnp.integer):
            rounded = rounded.astype(np.float32)  # XLA promotes no float8, and finds this form where it has kernels
        if self._of_bytes():
            sums = jnp.int32 if rounded.dtype == jnp.int8 else wide
            product = contract(rounded, stored["values"], layout, lowering, out_dtype=sums) * scale.reshape(-1)
        else:
            product = self._by_groups(rounded, stored["values"], scale, layout, few)
        return (product * token["scale"]).astype(x.dtype)

    def columns(self, stored: Stored, indices: jax.Array, layout: str, dtype: Any) -> jax.Array:
        parts = (stored["values"], self._weight_scale().load(stored, _wide(dtype)))
        values, scale = (take_columns(part, indices, layout) for part in parts)
        return self._restore(values, scale, indices.ndim, dtype)

    def encode(self, x: jax.Array) -> dict[str, jax.Array]:
        if x.shape[-1] % self.code.per_byte:
            raise Rejected(f"two values share a byte, and {x.shape[-1]} are odd")
        return self._quantize(x, x.ndim - 1, 1, self._token_scale())

    def decode(self, stored: Stored, dtype: Any) -> jax.Array:
        scale = self._token_scale().load(stored, _wide(dtype))
        return self._restore(stored["values"], scale, scale.ndim - 1, dtype)

    def cache_bound(self, x: np.ndarray) -> np.ndarray:
        return self._bound(x, x.ndim - 1, 1, self._token_scale())

    def _refuse(self, rows: int, columns: int) -> None:
        if why := self.why_not(rows, columns):
            raise Rejected(why)

    def _weight_scale(self) -> Scale:
        assert self.scale is not None, "the format holds no weights"
        return self.scale

    def _token_scale(self) -> Scale:
        assert self.cache_scale is not None, "the format holds no cache"
        return self.cache_scale

    def _groups(self, rows: int) -> int:
        return rows // self.group if self.group else 1

    def _of_bytes(self) -> bool:
        """Whether the values are multiplied as they are stored, and a scale comes after the sum."""
        return self.group is None and self.code.per_byte == 1

    def _quantize(self, x: Any, axis: int, groups: int, scales: Scale, scale: Any | None = None) -> dict[str, Any]:
        """Parts of `x`, whose `axis` is divided into `groups` with a scale each; `scale` has `groups` there."""
        xp = x.__array_namespace__()
        tiles = _split(x.astype(_wide(x.dtype)), axis, groups)
        chosen = scales.choose(abs(tiles).max(axis=axis + 1), self.code.limit) if scale is None else scale
        parts = scales.store(chosen)
        # By the scale as it is stored: what rounding took from it must not be lost to every value of the group.
        step = xp.expand_dims(scales.load(parts, tiles.dtype), axis + 1)
        codes = self.code.encode(xp.where(step > 0, tiles / xp.where(step > 0, step, 1), 0))
        if self.code.per_byte == 2:
            low, high = xp.split(codes, 2, axis=axis + 1)
            codes = low | high << 4
        return {"values": _join(codes, axis), **parts}

    def _open(self, values: Any, axis: int, groups: int, dtype: Any) -> Any:
        """The values of the codes, with `axis` as two, [groups, rows of a group]."""
        codes = _split(values, axis, groups)
        if self.code.per_byte == 2:
            # Both nibbles by one shift along a new axis, which stays a single elementwise loop.
            xp, shape = codes.__array_namespace__(), codes.shape
            shifts = np.array([0, 4], np.uint8).reshape(2, *[1] * (len(shape) - axis - 1))
            codes = _join(xp.expand_dims(codes, axis + 1) >> shifts & 15, axis + 1)
        return self.code.decode(codes, dtype)

    def _nibbles(self, values: Any, axis: int, groups: int, dtype: Any) -> list[Any]:
        """The values of the codes of each half of every group, or of all where a code takes a byte."""
        codes = _split(values, axis, groups)
        parts = [codes] if self.code.per_byte == 1 else [codes & 15, codes >> 4]
        return [self.code.decode(part, dtype) for part in parts]

    def _restore(self, values: Any, scale: Any, axis: int, dtype: Any) -> Any:
        xp = scale.__array_namespace__()
        tiles = self._open(values, axis, scale.shape[axis], scale.dtype) * xp.expand_dims(scale, axis + 1)
        return _join(tiles, axis).astype(dtype)

    def _by_groups(self, x: jax.Array, values: jax.Array, scale: jax.Array, layout: str, few: bool) -> jax.Array:
        """`x` times the codes summed inside each group, then times the scales and summed over the groups.

        For few rows, the low nibbles and the high ones are two products. A matrix-vector product of 1024 x 1024 with
        groups of 32 took 0.22 ms (int4) and 0.29 ms (e2m1) from [in, out] this way on 2 busy cores, and 0.53 and
        1.04 ms from [out, in]; as one product with the dequantised matrix, 0.40, 1.04, 1.16 and 3.87 ms.
        """
        axis, groups = _axis(layout), scale.shape[_axis(layout)]
        subscripts = "rgi,gio->rgo" if axis == 0 else "rgi,ogi->rgo"
        dtype, wide = (np.int8, np.int32) if x.dtype == np.int8 else (scale.dtype, scale.dtype)
        tiles = _split(x.reshape(-1, x.shape[-1]), 1, groups)
        if few:
            halves = zip(
                jnp.split(tiles, self.code.per_byte, axis=2), self._nibbles(values, axis, groups, dtype), strict=True
            )
            # XLA's CPU compiler (jaxlib 0.10.2) makes one call of both sums and gets half of the outputs wrong, for 5
            # tokens and 2048 columns of nvfp4; with a barrier they are two.
            sums = sum(jax.lax.optimization_barrier(multiply_reduce(subscripts, part, codes)) for part, codes in halves)
        else:
            codes = self._open(values, axis, groups, dtype)
            sums = jnp.einsum(subscripts, tiles, codes, preferred_element_type=wide)
        product = (jnp.asarray(sums, scale.dtype) * (scale if axis == 0 else scale.T)).sum(axis=1)
        return product.reshape(*x.shape[:-1], -1)

    def _bound(self, x: np.ndarray, axis: int, groups: int, scales: Scale) -> np.ndarray:
        """Half a step, or what the largest code leaves out, by the worst that rounding may make of the scale; and
        2^-22 for the float32 arithmetic that leads to the code."""
        size = _split(np.abs(x).astype(np.float64), axis, groups)
        low, high = scales.between(scales.choose(size.max(axis=axis + 1), self.code.limit).astype(np.float64))
        step, left = (np.expand_dims(scale, axis + 1) for scale in (high, low))
        worst = np.maximum(step * self.code.half_step, size * self.code.relative)
        return _join(np.maximum(worst, size - left * self.code.limit) + size * 2.0**-22, axis)


INPUTS: Mapping[str, Quantized] = {
    "int8": Quantized(INT8, cache_scale=FLOAT32),
    "float8_e4m3": Quantized(FLOAT8, cache_scale=FLOAT32),
}
"""What the inputs of products are rounded to: each token of x [..., in] has a float32 scale."""


def multiplied(inputs: str, dtype: str) -> str:
    """The dtype in which a product of a model in `dtype` multiplies, whose inputs are rounded to `inputs`."""
    return np.dtype(INPUTS[inputs].code.dtype).name if inputs in INPUTS else dtype


def _axis(layout: str) -> int:
    return 0 if layout == "in_out" else 1


def _wide(dtype: Any) -> Any:
    """The dtype to compute in."""
    return jnp.promote_types(dtype, jnp.float32)


def _split(array: Any, axis: int, groups: int) -> Any:
    """`array` with `axis` as two, [groups, the rest]."""
    shape = array.shape
    return array.reshape(*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])


def _join(array: Any, axis: int) -> Any:
    """`array` with `axis` and the one behind it as one."""
    shape = array.shape
    return array.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
