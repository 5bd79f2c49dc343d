import importlib.util
from dataclasses import replace

import pytest

from cosearch.architecture.cache import ORDERS
from cosearch.kernels import ATTENTION_KERNELS, CachedAttention
from tests.kernels.cases import check_attention

CACHED = CachedAttention(2, 4, 2, 64, 48, "bfloat16", "bshd", "bfloat16")


@pytest.mark.parametrize("layout", ORDERS)
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
def test_it_reads_every_cache(form: str, layout: str) -> None:
    check_attention(ATTENTION_KERNELS["dot_product_attention"], replace(CACHED, format=form, layout=layout), 33)


def test_cudnn_is_given_bfloat16_in_its_own_order() -> None:
    kernel = ATTENTION_KERNELS["cudnn"]
    assert kernel.why_not(CACHED) is None
    for changed in ({"format": "int8"}, {"dtype": "float32"}, {"layout": "bhsd"}, {"head_dim": 60}, {"head_dim": 256}):
        assert kernel.why_not(replace(CACHED, **changed))


@pytest.mark.parametrize(("name", "package"), [("cudnn", "jax_cuda13_plugin"), ("tokamax", "tokamax")])
def test_libraries_are_found_where_they_are_installed(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"cosearch.kernels.{'tokamax' if name == 'tokamax' else 'dot_product_attention'}.find_spec"
    monkeypatch.setattr(module, lambda _: None)
    assert "not installed" in (ATTENTION_KERNELS[name].why_unavailable() or "")
    found = importlib.util.find_spec("pytest")
    monkeypatch.setattr(module, lambda asked: found if asked == package else None)
    assert ATTENTION_KERNELS[name].why_unavailable() is None
