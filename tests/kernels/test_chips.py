"""The kernels compile for chips that are not there; `scripts/test_chips` installs what that takes."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from cosearch.architecture.cache import ORDERS
from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS, CachedAttention, Product
from cosearch.kernels.absent import CHIPS, compile_for, why_not
from cosearch.precision import FORMATS

pytestmark = pytest.mark.chips

PALLAS = {"v5e": "pallas_tpu", "v6e": "pallas_tpu", "h100": "pallas_gpu"}
FORMS = ("bfloat16", "float8_e4m3", "int8", "int4_g32", "int4_g64", "int4_g128")


def compile_product(chip: str, product: Product) -> bool:
    """Whether the kernel does the product; it compiles then."""
    kernel = MATMUL_KERNELS[PALLAS[chip]]
    if kernel.why_not(product):
        return False
    x = jax.ShapeDtypeStruct((product.tokens, product.rows), product.dtype)
    stored = FORMATS[product.format].spec(product.rows, product.columns, product.layout)
    compiled = compile_for(chip, lambda x, stored: kernel(x, stored, product), x, stored)
    assert "custom-call" in str(compiled.as_text())
    return True


def compile_attention(chip: str, attention: CachedAttention) -> bool:
    """As `compile_product`."""
    kernel = ATTENTION_KERNELS[PALLAS[chip]]
    if kernel.why_not(attention):
        return False
    shape = (attention.batch, attention.slots, attention.kv_heads, attention.head_dim)
    encoded: Any = jax.eval_shape(FORMATS[attention.format].encode, jax.ShapeDtypeStruct(shape, "float32"))
    stored = {
        part: jax.ShapeDtypeStruct(tuple(array.shape[axis] for axis in ORDERS[attention.layout]), array.dtype)
        for part, array in encoded.items()
    }
    query = jax.ShapeDtypeStruct((attention.batch, attention.heads, attention.head_dim), attention.dtype)
    length = jax.ShapeDtypeStruct((), jnp.int32)
    given = query, stored, stored, length
    compiled = compile_for(chip, lambda q, k, v, length: kernel(q, k, v, length, attention), *given)
    assert "custom-call" in str(compiled.as_text())
    return True


@pytest.mark.parametrize("chip", CHIPS)
def test_what_it_takes_is_installed(chip: str) -> None:
    assert why_not(chip) is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chip", CHIPS)
def test_products_compile(chip: str, form: str) -> None:
    done = [
        compile_product(chip, Product(tokens, rows, 4096, form, layout, dtype="bfloat16"))
        for tokens in (1, 9, 64)
        for rows in (4096, 2816)
        for layout in ("in_out", "out_in")
    ]
    assert any(done) or (chip, form) == ("h100", "int4_g32")


@pytest.mark.parametrize("form", ("bfloat16", "float8_e4m3", "int8"))
@pytest.mark.parametrize("chip", CHIPS)
def test_attention_compiles(chip: str, form: str) -> None:
    done = [
        compile_attention(chip, CachedAttention(2, 8 * sharing, 8, width, slots, form, layout, "bfloat16"))
        for sharing in (1, 4, 12)
        for slots in (1, 200, 4096)
        for width in (64, 128)
        for layout in ("bshd", "bhsd")
    ]
    assert any(done)
