"""Wrong kernels are rejected, each for what is wrong with it, and honest ones pass, however they order their sums."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosearch.architecture.attention.softmax import attend
from cosearch.architecture.cache import KVCache
from cosearch.core.errors import Rejected
from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS, CachedAttention, Product
from cosearch.measure.verify_kernel import (
    Case,
    attention_cases,
    matmul_cases,
    verify,
    verify_attention,
    verify_matmul,
)
from cosearch.precision import FORMATS
from cosearch.testing.kernels import check_attention_kernel, check_matmul_kernel
from tests.measure import planted

PRODUCT = Product(5, 96, 33, "float32", "in_out")
ATTENTION = CachedAttention(2, 4, 2, 16, 65, "float32", "bshd")


@pytest.fixture(scope="module")
def products() -> list[Case]:
    """Inputs as numpy has them, which a kernel can change."""
    return [replace(case, inputs=_numpy(case.inputs[0], case.inputs[1]["values"])) for case in matmul_cases(PRODUCT, 1)]


@pytest.fixture(scope="module")
def attentions() -> list[Case]:
    group, found = ATTENTION.heads // ATTENTION.kv_heads, []
    for case in attention_cases(ATTENTION, 1):
        query, key, value, length = case.inputs
        shared = [np.repeat(np.asarray(stored["values"]), group, axis=2) for stored in (key, value)]
        found.append(replace(case, inputs=(*_numpy(query, *shared), int(length))))
    return found


def _numpy(*arrays: Any) -> tuple[np.ndarray, ...]:
    return tuple(np.array(array) for array in arrays)


@pytest.mark.parametrize(
    "plant",
    planted.WRONG_PRODUCTS,
    ids=lambda plant: plant().__class__.__name__ if isinstance(plant, type) else plant().__name__,
)
def test_a_wrong_product_is_rejected(products: Sequence[Case], plant: Callable[[], planted.Product]):
    own = [replace(case, inputs=_numpy(*case.inputs)) for case in products]
    with pytest.raises(Rejected, match=r"^wrong result: "):
        verify(plant(), own)


@pytest.mark.parametrize("name", planted.HONEST_PRODUCTS)
def test_an_honest_product_passes(products: Sequence[Case], name: str):
    assert 0 < verify(planted.HONEST_PRODUCTS[name], products) <= 1


@pytest.mark.parametrize("plant", planted.WRONG_ATTENTIONS, ids=lambda plant: plant.__name__)
def test_wrong_attention_is_rejected(attentions: Sequence[Case], plant: planted.Attention):
    with pytest.raises(Rejected, match=r"^wrong result: "):
        verify(plant, attentions)


@pytest.mark.parametrize("name", planted.HONEST_ATTENTIONS)
def test_honest_attention_passes(attentions: Sequence[Case], name: str):
    assert 0 < verify(planted.HONEST_ATTENTIONS[name], attentions) <= 1


@pytest.mark.parametrize(
    ("plant", "why"),
    [
        (planted.skipped_tail, "normal inputs: a value is not finite"),
        (planted.changed_input, "it overwrites its inputs"),
        (planted.only_if_poisoned, "other bits when it is computed again"),
        (planted.RandomOrder(), "other bits when it is computed again"),
        (planted.wide, r"normal inputs: float64\[5, 33\], not float32\[5, 33\]"),
        (planted.clipped, "huge inputs: "),
        (planted.flushed, "tiny inputs: "),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
def test_it_is_said_what_is_wrong(products: Sequence[Case], plant: planted.Product, why: str):
    own = [replace(case, inputs=_numpy(*case.inputs)) for case in products]
    with pytest.raises(Rejected, match=why):
        verify(plant, own)


def test_what_is_declared_not_to_be_repeatable_need_not_be(products: Sequence[Case]):
    assert verify(planted.RandomOrder(), products, repeatable=False) <= 1


class JaxKernel:
    """A kernel in JAX."""

    platforms = frozenset({"cpu"})

    def __init__(
        self, compute: Callable[..., jax.Array], limit: Callable[[Any], str | None] = lambda case: None
    ) -> None:
        self._compute, self._limit = compute, limit

    def why_unavailable(self) -> str | None:
        return None

    def why_not(self, case: Any) -> str | None:
        if isinstance(case, Product) and case.compression is not None:
            return "it knows no compressed weights"
        return self._limit(case)

    def __call__(self, *arguments: Any) -> jax.Array:
        return self._compute(*arguments)


def kernel_of(compute: Callable[..., jax.Array], limit: Callable[[Any], str | None] = lambda case: None) -> Any:
    """A kernel of either kind."""
    return JaxKernel(compute, limit)


def dequantized(x: jax.Array, stored: Mapping[str, jax.Array], product: Product) -> jax.Array:
    return FORMATS[product.format].matmul(x, stored, product.layout, "multiply_reduce", product.inputs)


def summed_at_once(q: jax.Array, key: Any, value: Any, length: jax.Array, attention: CachedAttention) -> jax.Array:
    held = KVCache(attention.format, attention.layout, attention.dtype)
    keys, values = (held.load({"tensor": stored}, "tensor") for stored in (key, value))
    seen = jnp.arange(attention.slots)[None] < length
    return attend(q[:, None], keys, values, seen, "multiply_reduce")[:, 0]


def next_scale(x: jax.Array, stored: Mapping[str, jax.Array], product: Product) -> jax.Array:
    """Each group is multiplied with the next one's scale."""
    axis = 0 if product.layout == "in_out" else 1
    return dequantized(x, {**stored, "scale": jnp.roll(stored["scale"], 1, axis)}, product)


def scale_of_a_part(x: jax.Array, stored: Mapping[str, jax.Array], product: Product) -> jax.Array:
    """Inputs are rounded by the largest of the first half of a token."""
    step = jnp.abs(x[:, : product.rows // 2]).max(axis=1, keepdims=True) / 127
    rounded = (x / jnp.where(step > 0, step, 1)).round().clip(-127, 127) * step
    return dequantized(rounded, stored, replace(product, inputs="as_is"))


def only_in_32_rows(x: jax.Array, stored: Mapping[str, jax.Array], product: Product) -> jax.Array:
    """Right where 32 divides the rows, as at the shape that it was tested at; the rest is left out."""
    whole = product.rows // 32 * 32 or product.rows
    return dequantized(jnp.where(jnp.arange(product.rows) < whole, x, 0), stored, product)


def no_scale_of_keys(q: jax.Array, key: Any, value: Any, length: jax.Array, attention: CachedAttention) -> jax.Array:
    """All keys have the scale of the first."""
    return summed_at_once(q, {**key, "scale": key["scale"] * 0 + key["scale"][:, :1]}, value, length, attention)


@pytest.mark.parametrize(
    ("plant", "product"),
    [
        (next_scale, Product(3, 96, 17, "int4_g32", "in_out")),
        (next_scale, Product(3, 96, 17, "int4_g32", "out_in", dtype="bfloat16")),
        (scale_of_a_part, Product(16, 64, 16, "int8", "in_out", "int8")),
        (only_in_32_rows, Product(1, 65, 16, "int8", "in_out")),
        (lambda x, stored, product: dequantized(x, stored, product).astype(jnp.bfloat16), PRODUCT),
        (lambda x, stored, product: dequantized(x, stored, product)[:1], PRODUCT),
    ],
)
def test_a_wrong_kernel_of_packed_weights_is_rejected(plant: Callable[..., jax.Array], product: Product):
    verify_matmul(kernel_of(dequantized), product, 0)
    with pytest.raises(Rejected, match=r"^wrong result: "):
        verify_matmul(kernel_of(plant), product, 0)


def test_a_wrong_kernel_of_a_packed_cache_is_rejected():
    attention = CachedAttention(1, 4, 2, 32, 17, "int8", "bshd")
    verify_attention(kernel_of(summed_at_once), attention, 0)
    with pytest.raises(Rejected, match=r"^wrong result: "):
        verify_attention(kernel_of(no_scale_of_keys), attention, 0)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """Registers a kernel of either kind for one test."""

    def add(name: str, kernel: Any) -> None:
        for registry in (MATMUL_KERNELS, ATTENTION_KERNELS):
            registry.names()  # what is there is loaded
            monkeypatch.setitem(registry._entries, name, kernel)

    return add


def test_the_contract_passes_an_honest_kernel(register: Callable[[str, Any], None]):
    register("honest product", kernel_of(dequantized))
    check_matmul_kernel("honest product", examples=8)
    register("honest attention", kernel_of(summed_at_once))
    check_attention_kernel("honest attention", examples=3)


def test_the_contract_finds_what_is_right_at_the_tested_shape_only(register: Callable[[str, Any], None]):
    kernel = kernel_of(only_in_32_rows, lambda product: None if product.format == "int8" else "int8 only")
    verify_matmul(kernel, Product(1, 64, 16, "int8", "in_out"), 0)
    register("tested at 64", kernel)
    with pytest.raises(AssertionError, match=r"^tested at 64 is right for Product\("):
        check_matmul_kernel("tested at 64")


def test_a_kernel_that_does_nothing_breaks_the_contract(register: Callable[[str, Any], None]):
    register("idle", kernel_of(dequantized, lambda product: "never"))
    with pytest.raises(AssertionError, match="idle does one of the cases at least"):
        check_matmul_kernel("idle")
