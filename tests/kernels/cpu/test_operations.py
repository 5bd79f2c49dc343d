"""Every operation against float64: all formats, edges of sizes, epilogues, and processors with fewer instructions."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cosearch import sparsity
from cosearch.architecture.cache import ORDERS
from cosearch.architecture.linear import MatrixStorage
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices
from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS, CachedAttention, Product
from cosearch.kernels.cpu import build, operations, tiles
from cosearch.kernels.cpu.operations import CACHES, GATED, GELU, NONE, RESIDUAL, WEIGHTS, Factor
from cosearch.kernels.cpu.program import Buffer, Program
from cosearch.measure.verify_kernel import verify_attention
from cosearch.precision import FORMATS
from cosearch.precision.quantized import INPUTS
from cosearch.schedule import CACHE_LAYOUTS

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.usefixtures("quick_kernels"),
]

TOKENS = (1, 2, 3, 7, 8, 9, 64)
# Rows that are no multiple of 16, 32, 64 or 128; of formats with groups, the fewest and a last part of 128.
ROWS: Mapping[int, tuple[int, ...]] = {
    0: (1, 17, 48, 100),
    16: (16, 144),
    32: (32, 160),
    64: (64, 192),
    128: (128, 256),
}
COLUMNS = (21, 8, 19)
"""Of three matrices side by side."""
EPILOGUES = ((3, NONE), (1, RESIDUAL), (2, GATED), (1, GELU))
"""How many matrices, and what becomes of their product."""


@pytest.fixture(params=["all", "avx2"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With all instructions of this processor, or as if it were an old one."""
    if request.param == "avx2":
        monkeypatch.setattr(build, "INSTRUCTIONS", {"avx2": build.INSTRUCTIONS["avx2"]})
    build.instructions.cache_clear()
    yield request.param
    monkeypatch.undo()
    build.instructions.cache_clear()


def rounded_inputs(x: np.ndarray, inputs: str) -> np.ndarray:
    """What is multiplied, in float64."""
    if inputs == "as_is":
        return x.astype(np.float64)
    # By numpy: XLA makes products with a reciprocal of the divisions, which now and then gives another code.
    token: Any = INPUTS[inputs].encode(np.asarray(x, np.float32))  # pyright: ignore[reportArgumentType]
    return np.asarray(token["values"], np.float64) * np.asarray(token["scale"], np.float64)


def finished(sums: list[np.ndarray], sizes: list[np.ndarray], epilogue: int, residual: np.ndarray) -> Any:
    """The result in float64, and by what its errors are measured."""
    if epilogue == NONE:
        return np.concatenate(sums, 1), np.concatenate(sizes, 1)
    if epilogue == RESIDUAL:
        return sums[0] + residual, sizes[0] + np.abs(residual)
    if epilogue == GATED:
        return sums[0] / (1 + np.exp(-sums[0])) * sums[1], 2.5 * (sizes[0] + 1) * (sizes[1] + 1)
    inner = np.sqrt(2 / np.pi) * (sums[0] + 0.044715 * sums[0] ** 3)
    return 0.5 * sums[0] * (1 + np.tanh(inner)), 2 * (sizes[0] + 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("form", "inputs"),
    [(form, inputs) for form in WEIGHTS for inputs in ("as_is", *{"int8"} & {*FORMATS[form].inputs})],
)
def test_products(form: str, inputs: str, dtype: str, isa: str):
    """One program for all sizes: what one product leaves in memory must not matter to the next."""
    if inputs != "as_is" and "vnni" not in build.instructions():
        why = operations.why_no_product(Product(1, 128, 8, form, "out_in", inputs, dtype))
        assert why is not None and "VNNI" in why
        return
    rng = np.random.default_rng(0)
    program, wanted = Program(), []
    group = tiles.GROUPS.get(form, 0)
    for rows in ROWS[group]:
        packed = [FORMATS[form].pack(rng.standard_normal((rows, n)).astype(np.float32), "out_in") for n in COLUMNS]
        matrices = [FORMATS[form].unpack(one, "out_in") for one in packed]
        stored = [{part: jnp.asarray(array) for part, array in one.items()} for one in packed]
        scale = rng.uniform(0.5, 2, rows).astype(np.float32)
        for tokens in TOKENS:
            x = rng.standard_normal((tokens, rows)).astype(ml_dtypes.bfloat16).astype(np.float32)
            at, norm = program.argument(jnp.asarray(x)), jnp.asarray(scale)
            for (count, epilogue), normed in zip(EPILOGUES, (True, False, tokens % 2 == 0, False), strict=True):
                widths = COLUMNS[:count] if epilogue == NONE else (COLUMNS[0],) * count
                which = list(range(count)) if epilogue == NONE else [0] * count
                product = Product(tokens, rows, sum(widths), form, "out_in", inputs, dtype)
                assert operations.why_no_product(product) is None
                residual = rng.standard_normal((tokens, widths[0])).astype(np.float32)
                out = program.result((tokens, sum(widths) if epilogue == NONE else widths[0]))
                operations.matmul(
                    *(program, at, [Factor(stored[i], COLUMNS[i]) for i in which], product, out),
                    *(norm if normed else None, epilogue),
                    program.argument(jnp.asarray(residual)) if epilogue == RESIDUAL else None,
                )
                fed = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, 1, keepdims=True) + 1e-6) * scale if normed else x
                fed = rounded_inputs(fed, inputs)
                sums, sizes = ([f(fed) @ f(matrices[i]) for i in which] for f in (np.asarray, np.abs))
                exact, size = finished(sums, sizes, epilogue, residual)
                # Normalised inputs are rounded once more, and 4-bit weights times scales are where they are opened.
                rounded = (normed and (dtype, inputs) != ("float32", "as_is")) or (dtype == "bfloat16" and group)
                wanted.append((product, epilogue, normed, exact, size, 8e-3 if rounded else 2e-6))
    for result, (*case, exact, size, allowed) in zip(program.call(), wanted, strict=True):
        error = float(np.max(np.abs(np.asarray(result, np.float64) - exact) / np.maximum(size, 1e-30)))
        assert error <= allowed, (case, error)


@pytest.mark.parametrize(
    ("form", "pattern"), [("int8", "2:4"), ("int8", "4:8"), ("int8", "1:4"), ("float32", "2:4"), ("bfloat16", "4:8")]
)
def test_products_of_which_some_weights_are_stored(form: str, pattern: str):
    shape = DecoderShape.of(Choices({"width": 64, "depth": 1}))
    compression = sparsity.served_shape(shape, Choices({"pattern": "n_m", "n_m": pattern})).compression
    storage = MatrixStorage(form, "out_in", compression=compression)
    if "avx512" not in build.instructions():
        why = operations.why_no_product(storage.product(1, (32, 3), "float32"))
        assert why is not None and "AVX-512" in why
        return
    rng = np.random.default_rng(0)
    program, wanted = Program(), []
    for rows, columns in ((32, 3), (96, 21), (544, 19)):
        packed = storage.pack(rng.standard_normal((rows, columns)).astype(np.float32))
        stored, matrix = jax.tree.map(jnp.asarray, packed), storage.unpack(packed, (rows, columns))
        assert np.count_nonzero(matrix) <= matrix.size / 2
        for tokens in (1, 2, 3, 9):
            product = storage.product(tokens, (rows, columns), "float32")
            assert operations.why_no_product(product) is None
            x = rng.standard_normal((tokens, rows)).astype(np.float32)
            out = program.result((tokens, columns))
            operations.matmul(program, program.argument(jnp.asarray(x)), [Factor(stored, columns)], product, out)
            wanted.append((product, x.astype(np.float64) @ matrix, np.abs(x) @ np.abs(matrix)))
    for result, (product, exact, size) in zip(program.call(), wanted, strict=True):
        assert (np.abs(np.asarray(result) - exact) <= 2e-6 * size).all(), product


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "float16"}, "it knows no weights in float16"),
        ({"layout": "in_out"}, r"it reads matrices from \[out, in\]"),
        ({"dtype": "float64"}, "it computes in float32, not in float64"),
        ({"inputs": "float8_e4m3"}, "inputs in float8_e4m3 are not multiplied with such weights"),
        ({"rows": 10**6}, "rows of 1000000 are more than the 65536 that its memory is made for"),
    ],
)
def test_a_product_that_it_does_not_do_is_refused_in_words(change: dict[str, Any], words: str):
    product = Product(1, 64, 64, "int8", "out_in")
    assert MATMUL_KERNELS["cpp"].why_not(product) is None
    why = MATMUL_KERNELS["cpp"].why_not(replace(product, **change))
    assert why is not None and why.replace("[", r"\[").replace("]", r"\]") == words


def test_integers_need_their_instruction(isa: str):
    why = MATMUL_KERNELS["cpp"].why_not(Product(1, 64, 64, "int8", "out_in", "int8"))
    assert why == (None if "vnni" in build.instructions() else "the processor multiplies no int8 numbers (VNNI)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "nvfp4"}, "it knows no caches in nvfp4"),
        ({"dtype": "float64"}, "it computes in float32, not in float64"),
        ({"format": "int4", "head_dim": 80}, "it reads 4 bits 32 at a time, and a head has 80"),
        ({"head_dim": 2048}, "1 queries of 2048 to one head of keys are more than its memory is made for"),
        (
            {"heads": 128, "head_dim": 128},
            "128 queries of 128 to one head of keys are more than its memory is made for",
        ),
        ({"heads": 512, "head_dim": 2}, "512 queries of 2 to one head of keys are more than its memory is made for"),
    ],
)
def test_an_attention_that_it_does_not_do_is_refused_in_words(change: dict[str, Any], words: str):
    attention = CachedAttention(1, 1, 1, 64, 64, "int8", "bshd")
    assert ATTENTION_KERNELS["cpp"].why_not(attention) is None
    assert ATTENTION_KERNELS["cpp"].why_not(replace(attention, **change)) == words
    assert ATTENTION_KERNELS["cpp"].why_not(replace(attention, heads=96, head_dim=128)) is None


def in_memory(stored: Mapping[str, Any], layout: str) -> dict[str, np.ndarray]:
    return {part: np.array(np.asarray(array).transpose(ORDERS[layout])) for part, array in stored.items()}


def poison(stored: dict[str, np.ndarray], layout: str, length: int) -> None:
    """Put NaN where no token is, in whatever of the parts has one."""
    for part, array in stored.items():
        slots = array.swapaxes(ORDERS[layout].index(1), 0)
        if part == "scale" or array.dtype in (np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
            slots[length:] = np.nan
        else:
            slots[length:] = 255 if array.dtype == np.uint8 else -128


def attended(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """[B, H, D] in float64."""
    group = query.shape[1] // key.shape[2]
    key, value = (np.repeat(one, group, axis=2) for one in (key, value))
    scores = np.einsum("bhd,bshd->bhs", query, key)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhs,bshd->bhd", weights / weights.sum(-1, keepdims=True), value)


# Batch, heads, key/value heads, size of a head, slots: one head for each query, several queries for one, odd groups.
ATTENTIONS = ((1, 2, 2, 32, 37), (2, 6, 2, 24, 129), (1, 4, 1, 64, 600), (1, 7, 1, 96, 17))


@pytest.mark.parametrize("form", CACHES)
def test_attention_reads_its_slots_and_no_other(form: str, isa: str):
    rng = np.random.default_rng(0)
    program, wanted = Program(), []
    for batch, heads, kv_heads, head_dim, slots in ATTENTIONS:
        if form == "int4" and head_dim % 32:
            head_dim = 32
        shape = (batch, slots, kv_heads, head_dim)
        stored = [FORMATS[form].encode(jnp.asarray(rng.standard_normal(shape), jnp.float32)) for _ in range(2)]
        key, value = (np.asarray(FORMATS[form].decode(one, jnp.float32), np.float64) for one in stored)
        query = rng.standard_normal((batch, heads, head_dim)).astype(np.float32)
        at = program.argument(jnp.asarray(query).reshape(batch, -1))
        for layout in CACHE_LAYOUTS:
            sizes = CachedAttention(batch, heads, kv_heads, head_dim, slots, form, layout)
            for length in (1, slots - 1, slots):
                held = [in_memory(one, layout) for one in stored]
                for one in held:
                    poison(one, layout, length)
                caches = [{part: program.argument(jnp.asarray(a)) for part, a in one.items()} for one in held]
                out = program.result((batch, heads * head_dim))
                operations.attend(program, at, sizes, (caches[0], caches[1]), program.argument(jnp.int32(length)), out)
                exact = attended(query.astype(np.float64), key[:, :length], value[:, :length])
                wanted.append(((sizes, length), exact.reshape(batch, -1)))
    for result, (case, exact) in zip(program.call(), wanted, strict=True):
        assert np.allclose(result, exact, rtol=0, atol=1e-5), (case, np.abs(np.asarray(result) - exact).max())


@pytest.mark.parametrize("form", CACHES)
def test_a_cache_holds_what_its_format_encodes(form: str, isa: str):
    """Bit by bit, for values of all sizes, in each memory order."""
    batch, tokens, kv_heads, head_dim, slots = 2, 5, 3, 32, 9
    rng = np.random.default_rng(0)
    shape = (batch, tokens, kv_heads, head_dim)
    values = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4, (*shape[:3], 1))
    values[0, 0] = 0
    values[0, 1, 0] *= 1e-39  # all of them denormal
    values[0, 1, 1] *= 1e30
    values[0, 2, 0] = rng.integers(-14, 15, head_dim) / 2  # halfway between codes
    values[0, 2, 0, 0] = 7
    values = values.astype(np.float32)
    where = np.array([4, 0, 8, slots, 2], np.int32)  # one is not written
    program, before = Program(), {}
    for layout in CACHE_LAYOUTS:
        spec = in_memory(FORMATS[form].encode(jnp.zeros((batch, slots, kv_heads, head_dim))), layout)
        held: list[dict[str, Buffer]] = []
        for _ in range(2):
            parts = {part: jnp.asarray(np.full_like(array, 1)) for part, array in spec.items()}
            held.append({part: program.updated(array) for part, array in parts.items()})
        width = kv_heads * head_dim
        flat = values.reshape(batch * tokens, width)
        x = program.argument(jnp.asarray(np.concatenate([flat, flat, flat], 1)))
        turns = [program.argument(one((tokens, head_dim // 2), jnp.float32)) for one in (jnp.ones, jnp.zeros)]
        sizes = CachedAttention(batch, kv_heads, kv_heads, head_dim, slots, form, layout)
        operations.heads(
            *(program, x, sizes, tokens, (turns[0], turns[1]), None, program.argument(jnp.asarray(where))),
            *((held[0], held[1]), False, True),
        )
        before[layout] = spec
    results = iter(program.call())
    encoded: Any = FORMATS[form].encode(values)  # pyright: ignore[reportArgumentType] # of numpy, which divides exactly
    written = where < slots
    for layout in CACHE_LAYOUTS:
        for name in ("key", "value"):
            for part in before[layout]:
                logical = np.asarray(next(results)).transpose(np.argsort(ORDERS[layout]))
                there, right = logical[:, where[written]], encoded[part][:, written]
                same = bits(there) == bits(right)
                if name == "key" and form in ("float32", "bfloat16"):
                    # They were turned by an angle of 0, and denormal numbers are 0 in sums and products.
                    same = np.abs(there.astype(np.float64) - right.astype(np.float64)) < 1.2e-38
                assert same.all(), (layout, name, part, np.argwhere(~same)[:5])
                untouched = np.delete(logical, where[written], axis=1)
                assert (untouched == np.full_like(untouched, 1)).all()


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize(("form", "layout"), [("float32", "bshd"), ("int8", "bhds")])
def test_parts_of_a_context_are_put_together(form: str, layout: str, monkeypatch: pytest.MonkeyPatch):
    """Of several sequences and heads, in several chunks, as more threads than are here would."""
    monkeypatch.setattr(build, "threads", lambda: 8)
    attention = CachedAttention(2, 64, 2, 64, 600, form, layout)
    assert operations._splits(attention) > 1 and attention.batch * attention.heads * attention.head_dim >= 8192
    verify_attention(ATTENTION_KERNELS["cpp"], attention, 0)


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("inputs", ["int8", "float8_e4m3"])
def test_inputs_are_rounded_for_the_formats_that_say_so_alone(form: str, inputs: str):
    why = operations.why_no_product(Product(1, 128, 8, form, "out_in", inputs))
    if inputs not in FORMATS[form].inputs:
        assert why == f"inputs in {inputs} are not multiplied with such weights"
    elif inputs != "int8":
        assert why == f"it rounds no inputs to {inputs}"


@pytest.mark.parametrize("form", CACHES)
def test_nan_stays_nan(form: str, isa: str):
    """In a slot that is read, in a query, and in what a cache is written from."""
    sizes = CachedAttention(1, 2, 2, 32, 8, form, "bshd")
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((1, 8, 2, 32)).astype(np.float32)
    broken, query = whole.copy(), rng.standard_normal((1, 64)).astype(np.float32)
    broken[0, 3, 1, 5] = np.nan
    asked = query.copy()
    asked[0, 3] = np.nan
    program = Program()
    length, arguments = program.argument(jnp.int32(8)), {}
    for name, array in (("whole", whole), ("broken", broken)):
        stored = FORMATS[form].encode(jnp.asarray(array))
        arguments[name] = {part: program.argument(one) for part, one in stored.items()}
    for q, key, value in (
        ("q", "whole", "whole"),
        ("a", "whole", "whole"),
        ("q", "broken", "whole"),
        ("q", "whole", "broken"),
    ):
        at = program.argument(jnp.asarray(query if q == "q" else asked))
        operations.attend(program, at, sizes, (arguments[key], arguments[value]), length, program.result((1, 64)))
    fine, by_query, by_key, by_value = (np.isnan(np.asarray(one)).reshape(2, 32) for one in program.call())
    assert not fine.any()
    assert by_query[0].all() and not by_query[1].any()
    assert by_key[1].all() and not by_key[0].any()
    assert by_value[1, 5] and not by_value[0].any()


@pytest.mark.parametrize("inputs", ["as_is", "int8"])
def test_nan_among_the_inputs_of_a_product_stays_nan(inputs: str):
    product = Product(4, 64, 16, "int8", "out_in", inputs)
    if inputs == "int8" and "vnni" not in build.instructions():
        assert operations.why_no_product(product) is not None
        return
    stored = {
        part: jnp.asarray(one) for part, one in FORMATS["int8"].pack(np.ones((64, 16), np.float32), "out_in").items()
    }
    x = np.ones((4, 64), np.float32)
    x[2, 63] = np.nan
    out = MATMUL_KERNELS["cpp"](jnp.asarray(x), stored, product)
    assert np.isnan(np.asarray(out)).all(axis=1).tolist() == [False, False, True, False]
    assert not np.isnan(np.asarray(out)[[0, 1, 3]]).any()
