import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cosearch import testing
from cosearch.architecture.linear import MatrixStorage
from cosearch.precision import FORMATS
from cosearch.precision.codes import INT4
from cosearch.precision.quantized import Quantized
from cosearch.precision.scales import BFLOAT16, Scale

# A decoder of 10.6 million weights: an embedding, and 4 layers of 512 wide attention and 1408 wide feed-forward.
_LAYER = {"query": (512, 512), "key": (512, 128), "value": (512, 128), "output": (512, 512)}
_LAYER |= {"gate": (512, 1408), "up": (512, 1408), "down": (1408, 512)}
MATRICES = {f"layers.{layer}.{name}": sizes for layer in range(4) for name, sizes in _LAYER.items()}
MATRICES |= {"embedding": (512, 256)}
WEIGHTS = sum(map(math.prod, MATRICES.values()))
BITS = {
    "float32": 32,
    "bfloat16": 16,
    "int8": 8,
    "float8_e4m3": 8,
    "int4_g32": 4.5,
    "int4_g64": 4.25,
    "int4_g128": 4.125,
    "mxfp4": 4.25,
    "nvfp4": 4.5,
}


@pytest.mark.parametrize("name", [name for name in FORMATS.names() if FORMATS[name].weights])
def test_a_model_takes_the_bytes_that_the_format_says(name: str):
    assert 10e6 < WEIGHTS < 12e6
    form = FORMATS[name]
    assert sum(map(MatrixStorage(name).bits, MATRICES.values())) == pytest.approx(WEIGHTS * BITS[name], rel=0.01)
    packed = form.pack(np.ones((1408, 512), np.float32), "in_out")
    assert sum(array.nbytes for array in packed.values()) == pytest.approx(1408 * 512 * BITS[name] / 8, rel=0.01)


@pytest.mark.parametrize("name", [name for name in FORMATS.names() if FORMATS[name].weights])
def test_columns_of_zeros_and_tokens_of_zeros_give_zeros(name: str):
    form, weights = FORMATS[name], np.ones((128, 3), np.float32)
    weights[:, 1] = 0
    stored = {part: jnp.asarray(array) for part, array in form.pack(weights, "in_out").items()}
    x = jnp.asarray([[0.0] * 128, [1.0] * 128], jnp.float32)
    for lowering in ("dot", "multiply_reduce"):
        for inputs in ("as_is", *form.inputs):
            out = np.asarray(form.matmul(x, stored, "in_out", lowering, inputs))
            assert not out[0].any() and not out[:, 1].any() and (abs(out[1, ::2] - 128) < 0.5).all()


class Column(Quantized):
    """Stores a scale for every group, but the same for a whole column, and says so in its bound."""

    def _quantize(self, x: Any, axis: int, groups: int, scales: Scale, scale: Any | None = None) -> dict[str, Any]:
        chosen = scales.choose(abs(x).max(axis=axis, keepdims=True), self.code.limit).repeat(groups, axis=axis)
        return super()._quantize(x, axis, groups, scales, chosen)

    def _bound(self, x: np.ndarray, axis: int, groups: int, scales: Scale) -> np.ndarray:
        return super()._bound(x, axis, 1, scales)


class Unaware(Column):
    """The same, with the bound of scales by group."""

    _bound = Quantized._bound


class Generous(Quantized):
    def bound(self, weights: np.ndarray) -> np.ndarray:
        return 2 * super().bound(weights)


class Swapped(Quantized):
    """Multiplies with the nibbles of a byte exchanged."""

    def _by_groups(self, x: Any, values: Any, scale: Any, layout: str, few: bool) -> Any:
        return super()._by_groups(x, values >> 4 | values << 4, scale, layout, few)


class Silent(Quantized):
    """Makes one group of 48 rows, which it says that it does not hold."""

    def _refuse(self, rows: int, columns: int) -> None:
        if rows != 48:
            super()._refuse(rows, columns)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (Silent, "spec and pack raise Rejected where why_not speaks"),
        (Column, "the 32 x 1 weights that share a scale, made 64 times smaller"),
        (Unaware, "unpack is within bound"),
        (Generous, "bound is tight"),
        (Swapped, "matmul is x times unpack"),
    ],
)
def test_the_contract_finds_what_is_wrong(wrong: type[Quantized], rule: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FORMATS._entries, "wrong", wrong(INT4, group=32, scale=BFLOAT16, inputs=("int8",)))
    with pytest.raises(AssertionError, match=rule):
        testing.check_format("wrong")
