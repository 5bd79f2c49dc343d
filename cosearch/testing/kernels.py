"""The contract of kernels: right results for everything that they say they do, wherever its sizes end."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cosearch.architecture.cache import why_not
from cosearch.core.errors import Rejected
from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS, CachedAttention, Product
from cosearch.measure.verify_kernel import storage_of, verify_attention, verify_matmul
from cosearch.precision import FORMATS
from cosearch.schedule import CACHE_LAYOUTS
from cosearch.schedule.matmul import LAYOUTS
from cosearch.sparsity.n_m import NMCompression
from cosearch.testing.common import require

_EDGES = (1, 15, 16, 17, 63, 64, 65)
_ROWS = (1, 2, 15, 17, 32, 48, 64, 65, 96, 128, 160, 256, 384)
_DTYPES = ("float32", "bfloat16")
_COMPRESSIONS = (NMCompression(1, 4), NMCompression(2, 4), NMCompression(4, 8))
_HEADS = ((1, 1), (3, 3), (4, 2), (4, 1), (16, 2))


def check_matmul_kernel(name: str, examples: int = 25) -> None:
    """Check the kernel `name` of products on `examples` of the products that it does. It must be for the device at
    hand, and be there."""
    kernel = MATMUL_KERNELS[name]
    _require_at_hand(name, kernel)
    formats = [one for one in FORMATS.names() if FORMATS[one].weights]
    products = [
        Product(tokens, rows, columns, one, layout, inputs, dtype, compression)
        for one in formats
        for inputs in ("as_is", *FORMATS[one].inputs)
        for compression in (None, *(_COMPRESSIONS if inputs == "as_is" else ()))
        for tokens, rows, columns, layout, dtype in itertools.product(_EDGES, _ROWS, _EDGES, LAYOUTS, _DTYPES)
    ]
    whole, compressed = [], []
    for one in products:
        if storage_of(one).why_not((one.rows, one.columns)) is None and _admits(kernel, one):
            (compressed if one.compression else whole).append(one)
    _check(name, whole, lambda *case: verify_matmul(kernel, *case), examples)
    if compressed:
        _check(name, compressed, lambda *case: verify_matmul(kernel, *case), -(-examples // 3))


def check_attention_kernel(name: str, examples: int = 15) -> None:
    """Check the kernel `name` of attention on `examples` of what it does. It must be for the device at hand, and be
    there."""
    kernel = ATTENTION_KERNELS[name]
    _require_at_hand(name, kernel)
    formats = [one for one in FORMATS.names() if FORMATS[one].cache]
    cases = [
        CachedAttention(batch, heads, kv_heads, head_dim, slots, one, layout, dtype)
        for batch, (heads, kv_heads), head_dim, slots, one, layout, dtype in itertools.product(
            (1, 3), _HEADS, (16, 32, 64, 80, 128), (*_EDGES, 128, 200), formats, CACHE_LAYOUTS, _DTYPES
        )
        if why_not(one, head_dim) is None
    ]
    admitted = [one for one in cases if _admits(kernel, one)]
    _check(name, admitted, lambda *case: verify_attention(kernel, *case), examples)


def _require_at_hand(name: str, kernel: Any) -> None:
    require(jax.devices()[0].platform in kernel.platforms, f"{name} is for the device at hand")
    require(kernel.why_unavailable() is None, f"{name} is to be had: {kernel.why_unavailable()}")


def _admits(kernel: Any, case: Any) -> bool:
    why = kernel.why_not(case)
    require(why is None or (isinstance(why, str) and why.strip() != ""), f"why not is told in words, not {why!r}")
    return why is None


def _check(name: str, cases: Sequence[Any], verify: Callable[[Any, int], float], examples: int) -> None:
    require(len(cases) > 0, f"{name} does one of the cases at least")

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],  # every attempt at a smaller example would be compiled
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.sampled_from(cases), st.integers(0, 2**32 - 1))
    def check(case: Any, seed: int) -> None:
        try:
            verify(case, seed)
        except Rejected as rejection:
            raise AssertionError(f"{name} is right for {case}: {rejection}") from None

    check()
