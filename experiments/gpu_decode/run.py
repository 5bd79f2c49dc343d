"""What share of a GPU's memory bandwidth decoding's products and attention reach, by each of their implementations.

    python experiments/gpu_decode/run.py            # on a GPU, about 15 minutes; what is done is kept in results.jsonl
    python experiments/gpu_decode/run.py --dry-run  # anywhere: tiny shapes, simulated, and compiled for an absent H100

A case is an operation at one shape, format and layout. Its implementations are first compared with float64, then timed:
one jit holds enough calls, each waiting for the one before, that their operands, a copy for each call, are more than
three times the L2 cache. The implementations take turns in random order; nothing is subtracted. README.md has the
question and the figures.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosearch.architecture.attention.softmax import attend
from cosearch.architecture.cache import ORDERS
from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS, CachedAttention, Product
from cosearch.kernels.dot_product_attention import logical
from cosearch.precision import FORMATS
from cosearch.targets.accelerator import accelerator

RESULTS = Path(__file__).parent / "results.jsonl"

DATASHEET_BYTES_PER_S = 4.8e12  # H200 SXM, https://www.nvidia.com/en-us/data-center/h200/
ROTATED_BYTES = 192e6
CALLS = 256  # so many that calling the jit, which takes the host longer than a small product takes the GPU, is hidden
SAMPLES = 15
SAMPLE_S = 0.02
HIDDEN = ("case", "inputs", "dtype", "compression", "samples_s")  # of what is printed

SHAPES = {"gate, up": (4096, 14336), "down": (14336, 4096), "query, output": (4096, 4096), "key, value": (4096, 1024)}
"""[rows, columns] of a decoder layer of 8 billion parameters (Llama 3 8B)."""
SMALL = {"small": (1024, 2816)}
FORMATS_TIMED = ("bfloat16", "float8_e4m3", "int8")
BATCHES = (1, 16)

Case = Product | CachedAttention
Arrays = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Operands:
    """What an operation is applied to: `small` is the same in each call, a copy of `large` is read by it alone."""

    small: tuple[jax.Array, ...]
    large: tuple[Arrays, ...]

    @property
    def large_bytes(self) -> int:
        return sum(array.nbytes for arrays in self.large for array in arrays.values())


def cases() -> Iterator[Case]:
    """All cases; each layout and the 4-bit formats at the largest product only."""
    for batch in BATCHES:
        for form in FORMATS_TIMED:
            for layout in ("bshd", "bhsd"):
                yield CachedAttention(batch, 32, 8, 128, 4096, form, layout, "bfloat16")
        for form in FORMATS_TIMED:
            for rows, columns in (SHAPES | SMALL).values():
                yield Product(batch, rows, columns, form, "out_in", dtype="bfloat16")
            yield Product(batch, *SHAPES["gate, up"], form, "in_out", dtype="bfloat16")
        for form, layout in (("int4_g64", "out_in"), ("int4_g128", "out_in"), ("int4_g128", "in_out")):
            yield Product(batch, *SHAPES["gate, up"], form, layout, dtype="bfloat16")


def tiny_cases() -> Iterator[Case]:
    """One of each kind that the simulation ends in seconds."""
    for form in (*FORMATS_TIMED, "int4_g128"):
        yield Product(3, 256, 128, form, "out_in", dtype="bfloat16")
    for form in FORMATS_TIMED:
        yield CachedAttention(2, 8, 2, 64, 256, form, "bhsd", "bfloat16")


def implementations(case: Case) -> dict[str, Callable[..., jax.Array]]:
    """By name: plain XLA, and the kernels for GPUs that can be had and do this case."""
    registry: Any = MATMUL_KERNELS if isinstance(case, Product) else ATTENTION_KERNELS
    kernels = {name: registry[name] for name in registry}
    return {"xla": partial(plain, case)} | {
        name: partial(applied, kernel, case)
        for name, kernel in kernels.items()
        if "gpu" in kernel.platforms and not kernel.why_unavailable() and not kernel.why_not(case)
    }


def plain(case: Case, *arguments: Any) -> jax.Array:
    """The reference."""
    if isinstance(case, Product):
        return FORMATS[case.format].matmul(*arguments, case.layout, "dot", case.inputs)
    query, length, key, value = arguments
    mask = (jnp.arange(case.slots) < length)[None, :]
    return attend(query[:, None], logical(key, case), logical(value, case), mask, "dot")[:, 0]


def applied(kernel: Any, case: Case, *arguments: Any) -> jax.Array:
    """A kernel, with the arguments of `plain`."""
    if isinstance(case, Product):
        return kernel(*arguments, case)
    query, length, key, value = arguments
    return kernel(query, key, value, length, case)


def operands(case: Case, seed: int) -> Operands:
    """Random codes and scales, such as packing random numbers makes."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    if isinstance(case, Product):
        x = jax.random.normal(next(keys), (case.tokens, case.rows), case.dtype)
        spec = FORMATS[case.format].spec(case.rows, case.columns, case.layout)
        return Operands((x,), ({p: noise(next(keys), p, array) for p, array in spec.items()},))
    query = jax.random.normal(next(keys), (case.batch, case.heads, case.head_dim), case.dtype)
    length = jnp.asarray(case.slots - 1, jnp.int32)
    shape = (case.batch, case.slots, case.kv_heads, case.head_dim)
    tensors = [FORMATS[case.format].encode(jax.random.normal(next(keys), shape, case.dtype)) for _ in "kv"]
    return Operands(
        (query, length), tuple({p: a.transpose(ORDERS[case.layout]) for p, a in t.items()} for t in tensors)
    )


def noise(key: jax.Array, part: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
    """One part of a packed matrix."""
    if part == "scale":
        return jax.random.uniform(key, spec.shape, jnp.float32, 0.005, 0.015).astype(spec.dtype)
    if spec.dtype == jnp.int8:
        return jax.random.randint(key, spec.shape, -127, 128, jnp.int8)
    if spec.dtype == jnp.uint8:  # two nibbles from 1 to 15
        low, high = jax.random.randint(key, (2, *spec.shape), 1, 16, jnp.uint8)
        return low | high << 4
    return (jax.random.normal(key, spec.shape) * 50).astype(spec.dtype)


def exact(case: Case, given: Operands) -> np.ndarray:
    """The result in float64, on the host."""
    if isinstance(case, Product):
        stored = jax.tree.map(np.asarray, given.large[0])
        return np.asarray(given.small[0], np.float64) @ FORMATS[case.format].unpack(stored, case.layout)
    wide = replace(case, dtype="float32")  # holds each decoded number exactly
    query, length = (np.asarray(array, np.float64) for array in given.small)
    with jax.default_device(jax.devices("cpu")[0]):
        host = jax.tree.map(np.asarray, given.large)
        key, value = (np.asarray(logical(stored, wide), np.float64)[:, : int(length)] for stored in host)
    query = query.reshape(case.batch, case.kv_heads, -1, case.head_dim)
    scores = np.einsum("bkgd,bskd->bkgs", query, key) * case.head_dim**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bkgs,bskd->bkgd", weights, value).reshape(case.batch, case.heads, case.head_dim)


def error(out: jax.Array, truth: np.ndarray) -> float:
    """The norm of the error over that of the truth; NaN counts as infinite."""
    value = float(np.linalg.norm(np.asarray(out, np.float64) - truth) / np.linalg.norm(truth))
    return value if np.isfinite(value) else float("inf")


def chained(operation: Callable[..., jax.Array], turns: int) -> Callable[..., tuple[Any, list[jax.Array]]]:
    """`turns` times a call on each copy, where each call starts when the one before has ended."""

    def one_turn(_: Any, carry: tuple[Any, list[jax.Array]], copies: list[tuple[Arrays, ...]]) -> tuple[Any, Any]:
        small, outs = carry
        for index, large in enumerate(copies):
            small, outs[index - 1] = jax.lax.optimization_barrier((small, outs[index - 1]))
            outs[index] = operation(*small, *large)
        return small, outs

    def run(small: tuple[jax.Array, ...], copies: list[tuple[Arrays, ...]]) -> tuple[Any, list[jax.Array]]:
        out = jax.eval_shape(operation, *small, *copies[0])
        outs = [jnp.zeros(out.shape, out.dtype) for _ in copies]
        return jax.lax.fori_loop(0, turns, partial(one_turn, copies=copies), (small, outs))

    return jax.jit(run)


def measure(case: Case, rng: random.Random) -> list[dict[str, Any]]:
    """A row for each implementation."""
    given = operands(case, 0)
    truth = exact(case, given)
    count = max(4, -(-int(ROTATED_BYTES) // given.large_bytes))
    copies = [given.large] + [operands(case, seed).large for seed in range(1, count)]
    turns = -(-CALLS // count)
    runs, rows, failed = {}, {}, []
    for name, operation in implementations(case).items():
        row = {**describe(case), "implementation": name, "bytes": given.large_bytes}
        try:
            run = chained(operation, turns)
            _, outs = jax.block_until_ready(run(given.small, copies))
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as failure:
            failed.append(row | {"failure": str(failure).strip().splitlines()[0]})
            continue
        runs[name], rows[name] = run, row | {"copies": count, "error": error(outs[0], truth), "samples_s": []}
    repeats = {}
    for name, run in runs.items():
        once = seconds(run, given.small, copies, 2) / 2
        repeats[name] = max(1, round(SAMPLE_S / once))
    for _ in range(SAMPLES):
        for name in rng.sample(sorted(runs), len(runs)):
            taken = seconds(runs[name], given.small, copies, repeats[name])
            rows[name]["samples_s"].append(taken / repeats[name] / turns / count)
    for row in rows.values():
        row["median_s"] = statistics.median(row["samples_s"])
        row["bandwidth_share"] = given.large_bytes / row["median_s"] / DATASHEET_BYTES_PER_S
    return [*failed, *rows.values()]


def seconds(run: Callable[..., Any], small: Any, copies: Any, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        out = run(small, copies)
    jax.block_until_ready(out)
    return time.perf_counter() - start


def ceilings() -> dict[str, float]:
    """What plain passes over 4 GB reach, in bytes a second, read and written: the practical ceilings."""
    data = jax.random.normal(jax.random.key(0), (1 << 30,), jnp.float32)
    passes = {"copy": (jax.jit(lambda x: x + 1), 2), "read": (jax.jit(lambda x: x.reshape(1 << 12, -1).sum(1)), 1)}
    reached = {}
    for name, (run, moved) in passes.items():
        jax.block_until_ready(run(data))
        samples = [seconds(lambda x, _, run=run: run(x), data, None, 8) / 8 for _ in range(SAMPLES)]
        reached[name] = moved * data.nbytes / statistics.median(samples)
    return reached


def compile_for_h100(case: Case) -> str:
    """Whether the kernel compiles for a chip that is not there."""
    chip = accelerator("h100")
    if why := chip.why_unavailable():
        return why
    given = operands(case, 0)
    chip.compile(implementations(case)["pallas_gpu"], (*given.small, *given.large))
    return "compiled"


def dry_run() -> dict[str, Any]:
    """Each tiny case simulated and compared with float64, and compiled for an H100."""
    rows = []
    for case in tiny_cases():
        given = operands(case, 0)
        registry: Any = MATMUL_KERNELS if isinstance(case, Product) else ATTENTION_KERNELS
        kernel = registry["pallas_gpu"]
        row = {**describe(case), "h100": compile_for_h100(case)}
        if why := kernel.why_unavailable():
            row["simulated"] = why
        else:
            simulated = jax.jit(partial(applied, replace(kernel, interpret=True), case))
            row["error"] = error(simulated(*given.small, *given.large), exact(case, given))
        print(json.dumps(row))
        rows.append(row)
    return {"dry_run": True, "cases": len(rows), "largest_error": max((r.get("error", 0) for r in rows), default=0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.dry_run:
        print(json.dumps(dry_run()))
        return
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(f"this study needs a GPU, and JAX found {device.device_kind}; try --dry-run")
    rng = random.Random(0)
    done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    with args.results.open("a") as file:

        def record(rows: list[dict[str, Any]]) -> None:
            file.write("".join(json.dumps(row) + "\n" for row in rows))  # at once: a case is there whole or not at all
            file.flush()
            for row in rows:
                print(json.dumps({name: value for name, value in row.items() if name not in HIDDEN}), flush=True)
            done.extend(rows)

        if not done:
            record([{"device": device.device_kind, "jax": jax.__version__, "ceilings_bytes_per_s": ceilings()}])
        for case in cases():
            described = describe(case)
            if not any(described.items() <= row.items() for row in done):
                record(measure(case, rng))
    print(json.dumps(done[0] | {"share_of_pallas_gpu": shares(done)}))


def describe(case: Case) -> dict[str, Any]:
    return {"case": type(case).__name__, **asdict(case)}


def shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The largest share of the datasheet's bandwidth, by kind of case, format and batch."""
    best: dict[str, float] = {}
    for row in rows:
        if row.get("implementation") == "pallas_gpu" and "bandwidth_share" in row:
            kind = f"{row['case']}, {row['format']}, batch {row.get('tokens') or row['batch']}"
            best[kind] = max(best.get(kind, 0.0), round(row["bandwidth_share"], 3))
    return best


if __name__ == "__main__":
    main()
