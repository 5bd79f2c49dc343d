"""Axis *precision*: in which number formats weights, activations and the KV cache are stored, one file each.

A format packs matrices by numpy on the host or by JAX inside a training, by the same code, and computes with the packed
arrays in JAX. To add one, write `<name>.py` here (or in a package of your own, by an entry point in the
group `cosearch.format`) and register a `Format`; `cosearch.testing.check_format` then tests it. `quantized.py` has
what all formats with scales share, made of a code (`codes.py`) and a scale (`scales.py`); `calibration.py` has the ways
to choose what they store.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

import jax
import numpy as np

from cosearch.core.candidate import Choices, Value
from cosearch.core.errors import Rejected
from cosearch.core.registry import Registry, did_you_mean
from cosearch.core.space import Knob, choice

Stored = Mapping[str, Any]
"""The arrays of one packed tensor, by part: always "values", and what the format needs beside them."""


class Format(Protocol):
    """A number format. Matrices are logically [in, out]; `layout` is the order in memory, "in_out" or "out_in".

    Every part of a packed matrix has two axes in the order of `layout`; where a part is the same for several rows or
    columns (a scale), that axis is shorter.
    """

    weights: bool
    """Whether it can hold weights."""
    cache: bool
    """Whether it can hold a KV cache."""
    activations: bool
    """Whether a model can compute in it; then its name is a dtype's."""
    inputs: tuple[str, ...]
    """What the other factor of a product may be rounded to, beside "as_is" (`Precision.matmul_inputs`)."""
    calibrations: tuple[str, ...]
    """Ways to choose what is stored of a matrix (`calibration.py`); ("absmax",) where there is no choice."""

    def why_not(self, rows: int, columns: int) -> str | None:
        """Why a matrix [rows in, columns out] cannot be stored; None where it can."""
        ...

    def spec(self, rows: int, columns: int, layout: str) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a packed matrix.

        Raises:
            Rejected: `why_not` says why there are none.
        """
        ...

    def pack(self, weights: Any, layout: str, scale: Any | None = None) -> dict[str, Any]:
        """Pack a matrix [in, out], an array of numpy or a traced one of JAX, into arrays of the same kind.

        `scale`, where a calibration chose it, is used instead of the format's own choice.

        Raises:
            Rejected: `why_not` speaks, or an array of numpy holds values that the format has no place for (NaN,
                infinities).
        """
        ...

    def unpack(self, stored: Stored, layout: str) -> np.ndarray:
        """The matrix [in, out] in float64 that the packed arrays stand for."""
        ...

    def bound(self, weights: np.ndarray) -> np.ndarray:
        """The largest error that `pack` may make of each weight, [in, out] in float64."""
        ...

    def dequantize(self, stored: Stored, layout: str, dtype: Any) -> jax.Array:
        """The matrix in the order of `layout`, in `dtype`."""
        ...

    def matmul(self, x: jax.Array, stored: Stored, layout: str, lowering: str, inputs: str) -> jax.Array:
        """`x` [..., in] times the matrix, [..., out], accumulated in at least float32, in the dtype of `x`.

        `inputs` is "as_is" or one of `self.inputs`: what `x` is rounded to, by token, before it is multiplied.
        """
        ...

    def columns(self, stored: Stored, indices: jax.Array, layout: str, dtype: Any) -> jax.Array:
        """The columns [..., in] of the matrix at `indices` [...], in `dtype`."""
        ...

    def encode(self, x: jax.Array) -> dict[str, jax.Array]:
        """Pack a tensor [..., D] of keys or values; every part has its own last axis."""
        ...

    def decode(self, stored: Stored, dtype: Any) -> jax.Array:
        """What `encode` packed, in `dtype`."""
        ...

    def cache_bound(self, x: np.ndarray) -> np.ndarray:
        """The largest error that `encode` may make of each value, of the shape of `x` in float64."""
        ...


FORMATS: Registry[Format] = Registry("format", __name__)

CALIBRATIONS = ("absmax", "mse", "gptq", "awq")


def refuse_not_finite(weights: Any) -> None:
    """For `Format.pack`: refuse NaN and infinities, of which nothing is known inside a traced function."""
    if isinstance(weights, np.ndarray) and not np.isfinite(weights).all():
        raise Rejected("weights hold NaN or infinities")


def _names(role: str) -> tuple[str, ...]:
    return tuple(name for name in FORMATS.names() if getattr(FORMATS[name], role))


def _inputs() -> tuple[str, ...]:
    return ("as_is", *sorted({name for form in FORMATS.names() for name in FORMATS[form].inputs}))


def _why_no_rules(value: Value) -> str | None:
    if not isinstance(value, tuple):
        return f"{value!r} is not a list of rules 'MATRICES=FORMAT'"
    for rule in value:
        pattern, found, name = rule.partition("=") if isinstance(rule, str) else ("", "", "")
        if not found or not pattern:
            return f"{rule!r} must read 'MATRICES=FORMAT', for example 'layers.*.feedforward.*=int8'"
        if name not in _names("weights"):
            return f"{rule!r}: unknown format {name!r}{did_you_mean(name, _names('weights'))}"
    return None


KNOBS: Mapping[str, Knob] = {
    "weights": choice("float32", lambda: _names("weights")),
    "rules": Knob((), _why_no_rules),
    "calibration": choice("absmax", lambda: CALIBRATIONS),
    "kv_cache": choice("float32", lambda: _names("cache"), per_layer=True),
    "activations": choice("float32", lambda: _names("activations")),
    "matmul_inputs": choice("as_is", _inputs),
}


@dataclass(frozen=True)
class Precision:
    """The formats, by name.

    `weights` is that of the matrices; `rules`, each 'MATRICES=FORMAT', set another for those whose path matches, as
    'embedding=bfloat16' or 'layers.0.*=int8' do, and the last that matches holds. `kv_cache` is one format, or one for
    each layer, repeated over the depth. `activations` is the dtype of everything in between, and `matmul_inputs` what
    the inputs of the matrix products are rounded to, by token, where the weights' format can be multiplied with that
    ("as_is": nothing). `calibration` is how scales and rounded values are chosen.
    """

    weights: str = "float32"
    kv_cache: str | tuple[str, ...] = "float32"
    activations: str = "float32"
    rules: tuple[str, ...] = ()
    matmul_inputs: str = "as_is"
    calibration: str = "absmax"

    @classmethod
    def of(cls, choices: Choices) -> "Precision":
        return cls(**{name: choices.get(name, knob.default) for name, knob in KNOBS.items()})  # pyright: ignore[reportArgumentType]

    def weight_format(self, path: str) -> str:
        """The format of the matrix at `path`."""
        named = [rule.rpartition("=") for rule in self.rules]
        return next((name for pattern, _, name in reversed(named) if fnmatchcase(path, pattern)), self.weights)

    def cache_format(self, layer: int) -> str:
        """The format of a layer's KV cache."""
        return self.kv_cache if isinstance(self.kv_cache, str) else self.kv_cache[layer % len(self.kv_cache)]

    def why_not(self, matrices: Iterable[str]) -> str | None:
        """Why matrices of these paths cannot be stored so; their sizes are another matter."""
        formats = {path: self.weight_format(path) for path in matrices}
        for rule in self.rules:
            if not any(fnmatchcase(path, rule.rpartition("=")[0]) for path in formats):
                return f"the precision rule {rule!r} matches no matrix; there are {', '.join(formats)}"
        names = sorted(set(formats.values()))
        if self.matmul_inputs != "as_is" and not any(self.matmul_inputs in FORMATS[name].inputs for name in names):
            return f"no weights in {', '.join(names)} are multiplied with inputs in {self.matmul_inputs}"
        if not any(self.calibration in FORMATS[name].calibrations for name in names):
            return f"calibration {self.calibration!r} has nothing to choose in weights in {', '.join(names)}"
        return None
