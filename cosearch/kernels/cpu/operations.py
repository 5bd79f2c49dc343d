"""The operations of `native/` as functions that add them to a program: which file, which macros, which buffers.

Numbers between operations are float32, [tokens, width]. Matrices lie "out_in": each output is one row of memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax

from cosearch.kernels import CachedAttention, Product
from cosearch.kernels.cpu import build
from cosearch.kernels.cpu.program import Buffer, Kernel, Program
from cosearch.kernels.cpu.tiles import GROUPS, Tiles, few, tiles_for
from cosearch.precision import FORMATS

WEIGHTS = ("float32", "bfloat16", "int8", "float8_e4m3", *GROUPS)
"""The formats of weights that `native/matmul.cc` reads."""
CACHES = ("float32", "bfloat16", "int8", "float8_e4m3", "int4")
"""The formats of caches that `native/cache.h` reads and writes."""
_LAYOUTS = {"bshd": 0, "bhsd": 1, "bhds": 2}
MOST_ROWS = 65536
"""What the scratch memory of a thread has room for."""
_SCRATCH_BYTES = 4 << 20
"""Of a thread (`native/op.h`)."""
_MOST_HEAD_DIM = 1024
"""What `native/heads.cc` has room for."""

NONE, RESIDUAL, GATED, GELU = range(4)
"""What becomes of a product's sums (`native/matmul.cc`)."""


def why_no_product(product: Product) -> str | None:
    """Why `matmul` does not do a product; None where it does."""
    if product.format not in WEIGHTS:
        return f"it knows no weights in {product.format}"
    if product.layout != "out_in":
        return "it reads matrices from [out, in]"
    if product.compression is not None:
        if product.compression.of_groups is None or product.format in GROUPS:
            return f"it knows compressed weights by N:M alone, and not in {', '.join(GROUPS)}"
        if "avx512" not in build.instructions():
            return "without AVX-512 it knows no compressed weights"
    if product.dtype not in ("float32", "bfloat16"):
        return f"it computes in float32, not in {product.dtype}"
    if product.inputs != "as_is" and (product.compression or product.inputs not in FORMATS[product.format].inputs):
        return f"inputs in {product.inputs} are not multiplied with such weights"
    if product.inputs not in ("as_is", "int8"):
        return f"it rounds no inputs to {product.inputs}"
    if product.inputs == "int8" and "vnni" not in build.instructions():
        return "the processor multiplies no int8 numbers (VNNI)"
    if product.rows > MOST_ROWS:
        return f"rows of {product.rows} are more than the {MOST_ROWS} that its memory is made for"
    return None


def why_no_attention(attention: CachedAttention) -> str | None:
    """Why `attend`, `prefill` and `heads` do not do an attention; None where they do."""
    if attention.format not in CACHES:
        return f"it knows no caches in {attention.format}"
    if attention.dtype not in ("float32", "bfloat16"):
        return f"it computes in float32, not in {attention.dtype}"
    head_dim, group = attention.head_dim, attention.heads // attention.kv_heads
    if attention.format == "int4" and head_dim % 32:
        return f"it reads 4 bits 32 at a time, and a head has {head_dim}"
    padded = -(-head_dim // 16) * 16
    decode = group * (16 * head_dim if attention.layout == "bhds" else head_dim) + 66 * group
    chunk = 64 * group * padded + 128 * padded + 32 * 66 * group + 64
    if head_dim > _MOST_HEAD_DIM or 4 * max(decode, chunk) > _SCRATCH_BYTES:
        return f"{group} queries of {head_dim} to one head of keys are more than its memory is made for"
    return None


@dataclass(frozen=True)
class Factor:
    """A matrix: its stored parts, and how many columns it has."""

    stored: Mapping[str, jax.Array]
    columns: int


def _input_of(product: Product) -> str:
    """As what a product's input is prepared."""
    if product.inputs == "int8":
        return "int8"
    whole = product.compression is None and product.format != "float32"
    if not whole or product.dtype != "bfloat16" or "bf16" not in build.instructions():
        return "float32"
    return "float32" if few(product) and product.format in ("int8", "float8_e4m3") else "bfloat16"


def _kept_of(product: Product) -> tuple[int, int]:
    """How many of how many consecutive rows are stored; 0 of 0 where all are."""
    return (0, 0) if product.compression is None else product.compression.of_groups


def _kind_of(product: Product) -> int:
    """The kind of `native/prepare.cc` that a product reads."""
    nibbles = product.format in GROUPS
    if product.compression is not None:
        return 6
    if product.inputs == "int8":
        return 5 if nibbles else 4
    return ("float32", "bfloat16").index(_input_of(product)) + (2 if nibbles and few(product) else 0)


def _prepared_bytes(kind: int, rows: int) -> int:
    """As `prepared_stride` of `native/prepared.h`."""
    whole = -(-rows // 128)
    return (
        -(-rows // 16) * 64,
        -(-rows // 32) * 64,
        whole * 512,
        whole * 256,
        -(-rows // 64) * 64 + 64,
        whole * 192 + 64,
        -(-rows // 16) * 64 + 64,
    )[kind]


def matmul(
    program: Program,
    x: Buffer,
    factors: Sequence[Factor],
    product: Product,
    out: Buffer | None = None,
    norm: jax.Array | None = None,
    epilogue: int = NONE,
    residual: Buffer | None = None,
    tiles: Tiles | None = None,
) -> Buffer:
    """`x` [tokens, rows], RMS-normalised if there is a `norm` [rows], times matrices: [tokens, columns] side by side.

    `product` says how the matrices are stored; its columns are those of all. The result is `out`, or a temporary.
    `tiles`, if given, are taken instead of the best that are known.
    """
    kind, count = _kind_of(product), product.tokens
    prepared = x
    if norm is not None or kind != 0 or product.rows % 16:
        prepared = program.temporary(count * _prepared_bytes(kind, product.rows))
        scale = x if norm is None else program.argument(norm)
        group = _kept_of(product)[1] or GROUPS.get(product.format, 0)
        params = [count, product.rows, int(norm is not None), kind, group]
        program.add(Kernel("prepare"), [x, scale, prepared], params)
    columns = factors[0].columns if epilogue == GATED else sum(factor.columns for factor in factors)
    out = program.temporary(4 * count * columns) if out is None else out
    buffers = [prepared, out, out if residual is None else residual]
    for factor in factors:
        values = program.argument(factor.stored["values"])
        parts = [factor.stored.get(part) for part in ("scale", "tensor_scale", "indices")]
        buffers += [values, *(values if part is None else program.argument(part) for part in parts)]
    tiles = tiles or tiles_for(product)
    macros = {
        "FORMAT": product.format,
        "INPUT": f"{_input_of(product).upper()}_INPUT",
        "ROWS": tiles.rows,
        "TOKENS": tiles.tokens,
        "KEPT": _kept_of(product)[0],
        "GROUP": _kept_of(product)[1],
    }
    params = [
        *(count, product.rows, epilogue, tiles.chunks, tiles.ahead_bytes, tiles.panel_bytes),
        *(len(factors), *(factor.columns for factor in factors)),
    ]
    program.add(Kernel("matmul", tuple(sorted(macros.items()))), buffers, params)
    return out


def _parts(program: Program, cache: Mapping[str, Buffer]) -> list[Buffer]:
    return [cache["values"], cache.get("scale", cache["values"])]


def heads(
    program: Program,
    projections: Buffer,
    sizes: CachedAttention,
    tokens: int,
    turns: tuple[Buffer, Buffer],
    norms: tuple[jax.Array, jax.Array] | None,
    slots: Buffer,
    cache: tuple[Mapping[str, Buffer], Mapping[str, Buffer]],
    borrowed: bool,
    kept: bool,
) -> tuple[Buffer, Buffer, Buffer]:
    """Queries, keys and values of `tokens` of each sequence from their projections, the latter two written to the
    cache; `kept` ones are also given as the cache holds them."""
    count, own = sizes.batch * tokens, 0 if borrowed else sizes.kv_heads
    query = program.temporary(4 * count * sizes.heads * sizes.head_dim)
    key, value = (program.temporary(4 * count * own * sizes.head_dim) if kept else query for _ in range(2))
    scales = turns if norms is None else (program.argument(norms[0]), program.argument(norms[1]))
    buffers = [projections, *turns, *scales, slots, *_parts(program, cache[0]), *_parts(program, cache[1])]
    params = [
        *(sizes.batch, tokens, sizes.heads, own, sizes.head_dim, sizes.slots, _LAYOUTS[sizes.layout]),
        *(int(norms is not None), int(kept)),
    ]
    program.add(Kernel("heads", (("FORMAT", sizes.format),)), [*buffers, query, key, value], params)
    return query, key, value


def attend(
    program: Program,
    query: Buffer,
    sizes: CachedAttention,
    cache: tuple[Mapping[str, Buffer], Mapping[str, Buffer]],
    length: Buffer,
    out: Buffer | None = None,
) -> Buffer:
    """Decode attention [B, H D] to the slots below `length`."""
    out = program.temporary(4 * sizes.batch * sizes.heads * sizes.head_dim) if out is None else out
    splits = _splits(sizes)
    parts = out
    if splits > 1:
        parts = program.temporary(4 * sizes.batch * sizes.heads * splits * (sizes.head_dim + 2))
    buffers = [query, *_parts(program, cache[0]), *_parts(program, cache[1]), length, parts]
    count = (sizes.batch, sizes.heads, sizes.kv_heads, sizes.head_dim)
    kernel = Kernel("attend", (("FORMAT", sizes.format),))
    program.add(kernel, buffers, [*count, sizes.slots, _LAYOUTS[sizes.layout], splits])
    if splits > 1:
        program.add(Kernel("combine"), [parts, out], [*count, splits])
    return out


def _splits(sizes: CachedAttention) -> int:
    """Into how many parts the slots are divided: where sequences and heads are too few to keep all threads busy."""
    wanted = 2 * build.threads()
    have = sizes.batch * sizes.kv_heads
    return max(1, min(-(-wanted // have), sizes.slots // 256)) if have < wanted else 1


def prefill(
    program: Program,
    query: Buffer,
    own: tuple[Buffer, Buffer],
    sizes: CachedAttention,
    tokens: int,
    cache: tuple[Mapping[str, Buffer], Mapping[str, Buffer]],
    held: Buffer,
    start: Buffer,
    window: int | None,
    sinks: int,
) -> Buffer:
    """Attention of a chunk of `tokens` [B T, H D] to the slots that `held` [S] gives positions, and where it has a
    window, whose cache does not hold the chunk yet, to its `own` keys and values."""
    out = program.temporary(4 * sizes.batch * tokens * sizes.heads * sizes.head_dim)
    buffers = [query, *own, *_parts(program, cache[0]), *_parts(program, cache[1]), held, start, out]
    params = [
        *(sizes.batch, tokens, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.slots),
        *(_LAYOUTS[sizes.layout], window or 0, sinks, int(window is not None)),
    ]
    program.add(Kernel("prefill", (("FORMAT", sizes.format),)), buffers, params)
    return out


def delta(
    program: Program,
    projections: Buffer,
    gates: Buffer,
    vectors: Sequence[jax.Array],
    states: tuple[Buffer, Buffer],
    sizes: tuple[int, int, int],
) -> Buffer:
    """One token [B, H D] by the gated delta rule, for `sizes` (B, H, D); `states` are the last inputs of the
    convolutions and the state, both updated."""
    batch, heads, head_dim = sizes
    out = program.temporary(4 * batch * heads * head_dim)
    buffers = [projections, gates, *map(program.argument, vectors), *states, out]
    program.add(Kernel("delta"), buffers, list(sizes))
    return out


def read(program: Program, array: jax.Array) -> None:
    """Read all of an array, by every thread a part; the program's next result is sums of it."""
    count = build.threads()
    out = program.result((count,))
    program.add(Kernel("read"), [program.argument(array), out], [array.nbytes // 4096 * 4096, count])
