"""JAX 0.10's simulation of a GPU cannot run these kernels; `scripts/test_chips` does so with a newer JAX."""

from dataclasses import replace

import pytest

from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS, CachedAttention, Product
from cosearch.kernels.pallas_gpu import CACHES, WEIGHTS, PallasGpuAttention, PallasGpuMatmul
from tests.kernels.cases import check_attention, check_product

# Small blocks, so that small operands have several; out-of-bounds reads raise.
MATMUL = PallasGpuMatmul(block_bytes=128, thread_blocks=4, interpret=True)
ATTENTION = PallasGpuAttention(block=64, interpret=True)

simulated = pytest.mark.chips


@simulated
@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("form", WEIGHTS)
def test_products_of_many_blocks(form: str, layout: str) -> None:
    product = Product(5, 384, 128, form, layout, dtype="bfloat16")
    if MATMUL.why_not(product) is None:
        check_product(MATMUL, product)
    else:
        assert (form, layout) == ("int4_g64", "in_out")


@simulated
@pytest.mark.parametrize("thread_blocks", [1, 2])
@pytest.mark.parametrize("tokens", [1, 8, 9, 64])
def test_tokens_at_the_bounds_of_tiles(tokens: int, thread_blocks: int) -> None:
    kernel = replace(MATMUL, thread_blocks=thread_blocks)
    check_product(kernel, Product(tokens, 256, 64, "int8", "out_in", dtype="bfloat16"))


@simulated
@pytest.mark.parametrize("length", [1, 64, 65, 192])
def test_lengths_at_the_bounds_of_blocks(length: int) -> None:
    check_attention(ATTENTION, CachedAttention(2, 4, 2, 64, 192, "int8", "bhsd", "bfloat16"), length)


@simulated
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("form", CACHES)
def test_each_cache(form: str, layout: str) -> None:
    check_attention(ATTENTION, CachedAttention(1, 9, 1, 128, 128, form, layout, "bfloat16"), 100)


@simulated
@pytest.mark.parametrize(("slots", "length"), [(1, 1), (72, 72), (104, 70)])
@pytest.mark.parametrize(("form", "layout"), [("bfloat16", "bshd"), ("int8", "bshd"), ("int8", "bhsd")])
def test_slots_that_blocks_do_not_divide(form: str, layout: str, slots: int, length: int) -> None:
    check_attention(ATTENTION, CachedAttention(2, 4, 2, 64, slots, form, layout, "bfloat16"), length)


@simulated
def test_no_shared_heads() -> None:
    check_attention(ATTENTION, CachedAttention(1, 2, 2, 64, 64, "bfloat16", "bshd", "bfloat16"), 50)


PRODUCT = Product(1, 1024, 1024, "int8", "in_out", dtype="bfloat16")
CACHED = CachedAttention(1, 8, 2, 128, 1024, "int8", "bhsd", "bfloat16")


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": 65},
        {"rows": 1000},
        {"columns": 1000},
        {"format": "int4_g32"},
        {"format": "int4_g64"},
        {"inputs": "int8"},
        {"dtype": "float32"},
        {"compression": object()},
    ],
)
def test_products_that_are_refused(changed: dict) -> None:
    kernel = MATMUL_KERNELS["pallas_gpu"]
    assert kernel.why_not(PRODUCT) is None
    assert kernel.why_not(replace(PRODUCT, **changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"layout": "bhds"},
        {"format": "int4"},
        {"slots": 1001},
        {"head_dim": 32},
        {"heads": 128},
        {"dtype": "float32"},
    ],
)
def test_attention_that_is_refused(changed: dict) -> None:
    kernel = ATTENTION_KERNELS["pallas_gpu"]
    assert kernel.why_not(CACHED) is None
    assert kernel.why_not(replace(CACHED, **changed))


def test_blocks_fit_in_shared_memory() -> None:
    wide = Product(64, 4096, 4096, "int8", "in_out", dtype="bfloat16")
    narrow = replace(wide, tokens=1)
    assert PallasGpuMatmul()._block_rows(wide) < PallasGpuMatmul()._block_rows(narrow)
