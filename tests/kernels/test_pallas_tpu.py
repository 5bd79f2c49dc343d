from dataclasses import replace

import pytest

from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS, CachedAttention, Product
from cosearch.kernels.pallas_tpu import CACHES, GROUPS, WEIGHTS, PallasTpuAttention, PallasTpuMatmul
from tests.kernels.cases import check_attention, check_product

# The smallest blocks, so that small operands have several; out-of-bounds reads raise.
MATMUL = PallasTpuMatmul(block_rows=128, block_columns=128, interpret=True)
ATTENTION = PallasTpuAttention(block=128, interpret=True)


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("form", CACHES)
def test_products_of_many_blocks(form: str, layout: str) -> None:
    check_product(MATMUL, Product(5, 384, 256, form, layout, dtype="bfloat16"))


@pytest.mark.parametrize("form", GROUPS)
def test_products_with_codes_of_four_bits(form: str) -> None:
    check_product(MATMUL, Product(3, 2048, 128, form, "in_out"))


@pytest.mark.parametrize("tokens", [1, 64])
def test_the_fewest_and_the_most_tokens(tokens: int) -> None:
    check_product(MATMUL, Product(tokens, 128, 128, "int8", "in_out"))


@pytest.mark.parametrize("length", [1, 128, 129, 384])
def test_lengths_at_the_bounds_of_blocks(length: int) -> None:
    check_attention(ATTENTION, CachedAttention(2, 4, 2, 64, 384, "int8", "bhsd"), length)


@pytest.mark.parametrize("form", CACHES)
def test_each_cache(form: str) -> None:
    check_attention(ATTENTION, CachedAttention(1, 8, 1, 128, 256, form, "bhsd", "bfloat16"), 200)


def test_no_shared_heads() -> None:
    check_attention(ATTENTION, CachedAttention(1, 2, 2, 128, 128, "bfloat16", "bhsd"), 100)


PRODUCT = Product(1, 1024, 1024, "int8", "in_out")
CACHED = CachedAttention(1, 8, 2, 128, 1024, "int8", "bhsd")


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": 65},
        {"rows": 1000},
        {"columns": 1000},
        {"format": "mxfp4"},
        {"format": "int4_g32", "layout": "out_in"},
        {"inputs": "int8"},
        {"dtype": "float64"},
        {"compression": object()},
    ],
)
def test_products_that_are_refused(changed: dict) -> None:
    kernel = MATMUL_KERNELS["pallas_tpu"]
    assert kernel.why_not(PRODUCT) is None
    assert kernel.why_not(replace(PRODUCT, **changed))


@pytest.mark.parametrize("changed", [{"layout": "bshd"}, {"format": "float32"}, {"slots": 1000}, {"dtype": "float64"}])
def test_attention_that_is_refused(changed: dict) -> None:
    kernel = ATTENTION_KERNELS["pallas_tpu"]
    assert kernel.why_not(CACHED) is None
    assert kernel.why_not(replace(CACHED, **changed))


def test_what_it_reads() -> None:
    assert {*CACHES, *GROUPS} == set(WEIGHTS)
    assert MATMUL_KERNELS["pallas_tpu"].platforms == ATTENTION_KERNELS["pallas_tpu"].platforms == {"tpu"}
