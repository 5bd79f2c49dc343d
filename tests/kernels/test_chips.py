"""The kernels compile for chips that are not there; `scripts/test_chips` installs what that takes."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from cosearch.architecture.cache import ORDERS
from cosearch.architecture.decoder import Decoder
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices
from cosearch.core.workload import Phase
from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS, CachedAttention, Product
from cosearch.precision import FORMATS, Precision
from cosearch.schedule import Schedule
from cosearch.schedule.program import Program
from cosearch.targets.accelerator import accelerator

pytestmark = pytest.mark.chips

PALLAS = {"tpu_v5e": "pallas_tpu", "tpu_v6e": "pallas_tpu", "h100": "pallas_gpu"}
CHIPS = tuple(PALLAS)
"""What the kernels are written for."""
FORMS = ("bfloat16", "float8_e4m3", "int8", "int4_g32", "int4_g64", "int4_g128")


def compile_product(chip: str, product: Product) -> bool:
    """Whether the kernel does the product; it compiles then."""
    kernel = MATMUL_KERNELS[PALLAS[chip]]
    if kernel.why_not(product):
        return False
    x = jax.ShapeDtypeStruct((product.tokens, product.rows), product.dtype)
    stored = FORMATS[product.format].spec(product.rows, product.columns, product.layout)
    compiled = accelerator(chip).compile(lambda x, stored: kernel(x, stored, product), (x, stored))
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
    compiled = accelerator(chip).compile(lambda q, k, v, length: kernel(q, k, v, length, attention), given)
    assert "custom-call" in str(compiled.as_text())
    return True


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


def compiled_decoder(chip: str, phase: Phase = "decode", formats: Sequence[Any] = (), **schedule: Any) -> Any:
    """A program of a small decoder, and what it was compiled to."""
    shape = DecoderShape.of(Choices({"width": 256, "depth": 2, "attention": "mha", "ffn_ratio": 3}))
    model = Decoder(shape, Precision(), Schedule("unroll", **schedule))
    program = Program(model, phase, batch=8, capacity=1024, chunk=64)
    return program, program.compile({}, formats, accelerator(chip).compile)


@pytest.mark.parametrize("chip", ["tpu_v5e", "tpu_v6e"])
def test_the_compiler_for_tpus_chooses_layouts_that_it_copies_less(chip: str) -> None:
    """Weights and caches then lie so before, and a prefill takes them as they lie for the decode step."""

    def copies(compiled: Any) -> int:
        return len(re.findall(r"= \S+ (?:copy|transpose)\(", compiled.as_text()))

    _, plain = compiled_decoder(chip)
    program, chosen = compiled_decoder(chip, boundary="compiler")
    formats = program.formats(chosen)
    orders = [one.layout.major_to_minor for one in formats]
    assert any(order != tuple(sorted(order)) for order in orders)
    assert copies(chosen) < copies(plain)
    prefill, compiled = compiled_decoder(chip, "prefill", formats, boundary="compiler")
    assert [one.layout for one in prefill.formats(compiled)] == [one.layout for one in formats]


@pytest.mark.parametrize("chip", ["tpu_v5e", "tpu_v6e"])
def test_the_compiler_for_tpus_keeps_to_the_limits_of_fusion(chip: str) -> None:
    plain, limited = (compiled_decoder(chip, fuse_limit=limit)[1].as_text() for limit in ("none", "products"))
    assert "FUSE_LIMIT" in limited and "FUSE_LIMIT" not in plain
    assert limited.count(" fusion(") > plain.count(" fusion(")


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
