"""Every variant, format and pattern on one small model: what each costs and what it gives.

    python experiments/axes/run.py            # about 25 minutes on 2 cores; what is done is kept, so it can be stopped
    python experiments/axes/run.py --report   # write table.md from results.jsonl

Each row changes one thing of the default space's reference model (3 layers of width 128). Trainings, evaluations and
timings run for real; README.md says what the columns are and why the figures that surprise are as they are.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from rich.progress import track

from cosearch import axes
from cosearch.architecture.cache import zeros
from cosearch.architecture.decoder import params_spec, plain_decoder
from cosearch.core.candidate import Candidate, Value, canonical_json
from cosearch.core.space import Space
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.measure import timing
from cosearch.measure.bench import Bench, Compiled, steps
from cosearch.measure.fingerprint import fingerprint
from cosearch.paths import CONF, cache_dir
from cosearch.precision import Precision
from cosearch.quality import Recipe, corpus
from cosearch.quality.evaluate import evaluate
from cosearch.quality.serve import served

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results.jsonl", HERE / "table.md"

CONTEXT = 1024
"""Tokens in the cache while a decode step is timed: long enough for the caches to differ."""
ROUNDS = 60
TIMED_TOGETHER = 12
"""Rows that are timed side by side, the reference among them each time."""
RECOVERY_STEPS = 20
LOWERINGS: Mapping[str, Mapping[str, Value]] = {
    "dot": {"matmul": "dot"},
    "multiply_reduce": {"matmul": "multiply_reduce", "attention": "multiply_reduce"},
}
KERNELS: Sequence[Mapping[str, Value]] = (
    {"matmul": "cpp", "fusion": "step"},
    {"matmul": "cpp", "fusion": "layer"},
    {"matmul": "cpp", "attention": "cpp"},
    {"matmul": "cpp"},
)
"""What is tried one after the other, for not everything can be one call."""


@dataclass(frozen=True)
class Row:
    """What is changed of the reference, and whether a recovery follows."""

    axis: str
    name: str
    choices: Mapping[str, Value]
    recovered: bool = False


def rows() -> list[Row]:
    """All rows, the reference first."""
    joint = {"precision.weights": "int8", "precision.kv_cache": "int8", "sparsity.pattern": "n_m"}
    return [
        *architecture_rows(),
        *precision_rows(),
        *sparsity_rows(),
        Row("joint", "2:4 of int8, cache int8", joint),
    ]


def architecture_rows() -> list[Row]:
    window = {"architecture.attention": "sliding_window", "architecture.window": 64}
    choices: dict[str, dict[str, Value]] = {
        "mha (the reference)": {},
        "mha, no QK-norm": {"architecture.qk_norm": False},
        "gqa, 2 KV heads": {"architecture.attention": "gqa", "architecture.kv_heads": 2},
        "mqa": {"architecture.attention": "mqa"},
        "mla, latent 32": {"architecture.attention": "mla", "architecture.latent": 32},
        "mla, latent 64": {"architecture.attention": "mla", "architecture.latent": 64},
        "sliding_window 64": window,
        "sliding_window 64 + 4 sinks": window | {"architecture.sinks": 4},
        "local_global 2:1, window 64": {
            "architecture.attention": "local_global",
            "architecture.window": 64,
            "architecture.locals_per_global": 2,
        },
        "gated_delta": {"architecture.attention": "gated_delta"},
        "gated_delta, gated_delta, mha": {"architecture.attention": ("gated_delta", "gated_delta", "mha")},
        "mha, cross_layer, mha": {"architecture.attention": ("mha", "cross_layer", "mha")},
        "mha, none, mha": {"architecture.attention": ("mha", "none", "mha")},
        "half the heads in layer 1": {"architecture.heads_ratio": (1, 0.5, 1)},
        "gelu": {"architecture.feedforward": "gelu"},
        "moe, 2 of 4 experts + shared": {"architecture.feedforward": "moe"},
        "swiglu, none, swiglu": {"architecture.feedforward": ("swiglu", "none", "swiglu")},
    }
    return [Row("architecture", name, chosen) for name, chosen in choices.items()]


def precision_rows() -> list[Row]:
    int4: dict[str, Value] = {"precision.weights": "int4_g128"}
    weights = ("bfloat16", "float8_e4m3", "int8", "int4_g128", "int4_g64", "int4_g32", "mxfp4", "nvfp4")
    caches = ("bfloat16", "float8_e4m3", "int8", "int4")
    found = [Row("precision", f"weights {name}", {"precision.weights": name}) for name in weights]
    for method in ("mse", "gptq", "awq"):
        found.append(Row("precision", f"weights int4_g128, {method}", int4 | {"precision.calibration": method}))
    return [
        *found,
        Row("precision", "weights int4_g128, recovered", int4, recovered=True),
        Row("precision", "weights mxfp4, recovered", {"precision.weights": "mxfp4"}, recovered=True),
        Row("precision", "W8A8", {"precision.weights": "int8", "precision.matmul_inputs": "int8"}),
        Row("precision", "W4A8 (int4_g32)", {"precision.weights": "int4_g32", "precision.matmul_inputs": "int8"}),
        *(Row("precision", f"cache {name}", {"precision.kv_cache": name}) for name in caches),
        Row(
            "precision",
            "activations bfloat16",
            {"precision.activations": "bfloat16", "precision.kv_cache": "bfloat16"},
        ),
    ]


def sparsity_rows() -> list[Row]:
    found: list[Row] = []

    def add(name: str, pattern: str, criterion: str, recovered: bool = False, **kept: Value) -> None:
        choices: dict[str, Value] = {"sparsity.pattern": pattern, "sparsity.criterion": criterion}
        choices |= {f"sparsity.{knob}": value for knob, value in kept.items()}
        found.append(Row("sparsity", f"{name}, {criterion}" + ", recovered" * recovered, choices, recovered))

    for kept in (0.75, 0.5):
        for criterion in ("magnitude", "wanda"):
            add(f"channels x {kept:g}", "structured", criterion, channels_kept=kept, heads_kept=1)
    for recovered in (False, True):
        add("heads x 0.5", "structured", "wanda", recovered, heads_kept=0.5, channels_kept=1)
    for recovered in (False, True):
        add("2 of 3 layers", "structured", "wanda", recovered, layers_kept=2 / 3, heads_kept=1, channels_kept=1)
    for n_m in ("2:4", "4:8", "1:4"):
        for criterion in ("magnitude", "wanda", "sparsegpt"):
            add(n_m, "n_m", criterion, n_m=n_m)
        add(n_m, "n_m", "sparsegpt", recovered=True, n_m=n_m)
    for criterion in ("magnitude", "wanda"):
        add("half the blocks of 16", "block", criterion, blocks_kept=0.5)
    add("half the blocks of 16", "block", "wanda", recovered=True, blocks_kept=0.5)
    for kept in (2, 4, 8):
        chosen = {"sparsity.attention": "block_topk", "sparsity.attention_kept": kept}
        found.append(Row("sparsity", f"attention to {kept} + 1 blocks of 16", chosen))
    return found


def candidate(space: Space, row: Row, **schedule: Value) -> Candidate:
    """The candidate of a row, unrolled and otherwise plain unless `schedule` says more; checked to be legal."""
    declared = axes.declared_knobs()
    point = {name: knob.default for name, knob in declared.items()} | axes.load_space("llm_decode").reference.point
    point |= {"schedule.layers": "unroll"} | dict(row.choices)
    point |= {f"schedule.{name}": value for name, value in schedule.items()}
    canonical = space.canonical(point)
    if why := space.why_invalid(canonical):
        raise SystemExit(f"{row.name}: {why}")
    return Candidate.from_point(canonical)


def by_kernels(space: Space, row: Row) -> Candidate | None:
    """The candidate of a row with as much as can be in one call of C++ kernels; None where they run none of it."""
    plain = candidate(space, row).point
    for schedule in KERNELS:
        point = space.canonical(plain | {f"schedule.{name}": value for name, value in schedule.items()})
        if space.why_invalid(point) is None:
            return Candidate.from_point(point)
    return None


def own_recipe(row: Row, recipe: Recipe) -> Recipe:
    """What a row is trained by."""
    return replace(recipe, recovery_steps=RECOVERY_STEPS) if row.recovered else recipe.unrecovered


def key(measured: Mapping[str, Any]) -> str:
    """What a measured row is reused by: a candidate, a recipe and a compiler, not what the row is called."""
    return canonical_json([measured["uid"], measured.get("recipe"), measured["jaxlib"]])


def quality(one: Candidate, recipe: Recipe, text: corpus.Corpus) -> dict[str, Any]:
    """What is stored, and how good it is."""
    shape, precision = axes.served_shape(one), Precision.of(one.precision)
    model = plain_decoder(shape, precision)
    arrays = served(one, recipe, text, cache_dir(), lambda *_: None).params(model)
    scores = evaluate(model, arrays, recipe, text)
    spec = params_spec(model)
    assert {path: array.nbytes for path, array in arrays.items()} == {
        path: one.size * one.dtype.itemsize for path, one in spec.items()
    }

    def cache_bytes(capacity: int) -> int:
        return sum(array.nbytes for array in jax.tree.leaves(zeros(model.cache_spec(1, capacity))))

    bits = scores["bits_per_byte"]
    return {
        "parameters": shape.parameters,
        "weight_bytes": sum(array.nbytes for array in arrays.values()),
        "cache_bytes": cache_bytes(CONTEXT),
        "cache_bytes_per_token": (cache_bytes(2 * CONTEXT) - cache_bytes(CONTEXT)) / CONTEXT,
        "bits_per_byte": float(np.mean(bits)),
        "bits_per_byte_error": float(np.std(bits) / len(bits) ** 0.5),
        "recall_accuracy": float(np.mean(scores["recall_accuracy"])),
    }


def latencies(space: Space, group: Sequence[Row]) -> list[dict[str, Any]]:
    """Each row's decode step by XLA's two lowerings and, where they do it, by C++ kernels, verified and then timed
    side by side with the reference's."""
    workload = Workload("axes", (OperatingPoint("decode", 1, CONTEXT),))
    compiled: list[Compiled] = []
    named: list[tuple[int, str]] = []
    for index, row in enumerate(group):
        ways = {name: candidate(space, row, **lowering) for name, lowering in LOWERINGS.items()}
        if (native := by_kernels(space, row)) is not None:
            ways["cpp"] = native
        for name, one in ways.items():
            bench = Bench()
            bench.compile(one, workload)
            bench.verify(one)
            compiled += bench.programs
            named.append((index, name))
    samples = timing.side_by_side(steps(compiled), ROUNDS).sides
    found: list[dict[str, Any]] = [{"latency_s": {}, "interval_s": {}} for _ in group]
    for (index, name), side in zip(named, samples, strict=True):
        found[index]["latency_s"][name], found[index]["interval_s"][name] = timing.median_interval(side)
    reference = min(found[0]["latency_s"][name] for name in LOWERINGS)
    return [{**one, "reference_latency_s": reference} for one in found]


def known(space: Space, row: Row, recipe: Recipe) -> dict[str, Any]:
    """What is known of a row before it is measured."""
    return {
        "row": row.name,
        "axis": row.axis,
        "choices": dict(row.choices),
        "uid": candidate(space, row).uid,
        "recipe": own_recipe(row, recipe).to_json(),
        "processor": fingerprint()["processor"],
        "jaxlib": fingerprint()["jaxlib"],
    }


def measure(space: Space, wanted: Sequence[Row], recipe: Recipe) -> None:
    """Measure rows, and append them to `RESULTS`."""
    text, scores = corpus.load("python"), {}
    for row in track(wanted, "training and evaluating"):
        scores[row.name] = quality(candidate(space, row), own_recipe(row, recipe), text)
    for first in track(range(0, len(wanted), TIMED_TOGETHER), "verifying and timing"):
        group = wanted[first : first + TIMED_TOGETHER]
        for row, timed in zip(group, latencies(space, [rows()[0], *group])[1:], strict=True):
            measured = {**known(space, row, recipe), **scores[row.name], **timed, "context": CONTEXT}
            with RESULTS.open("a") as file:
                file.write(json.dumps(measured) + "\n")


def results() -> dict[str, dict[str, Any]]:
    """What `RESULTS` has, by `key`; of several the last counts."""
    return {key(one): one for one in map(json.loads, RESULTS.read_text().splitlines())} if RESULTS.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="short", help="a file of conf/quality")
    parser.add_argument("--report", action="store_true", help="only write the table of what is done")
    parser.add_argument("--only", default="", help="only rows whose name holds this")
    options = parser.parse_args()
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as in the workers of a search
    recipe = Recipe.from_json(yaml.safe_load((CONF / "quality" / f"{options.recipe}.yaml").read_text()))
    space = axes.load_space("llm_decode_full", target="cpu")
    keyed = [(row, key(known(space, row, recipe))) for row in rows()]
    if not options.report:
        done = results()
        measure(space, [row for row, own in keyed if options.only in row.name and own not in done], recipe)
    done = results()
    table = [done[own] for _, own in keyed if own in done]
    if not table:
        raise SystemExit(f"{RESULTS} has no row of these candidates, the recipe {options.recipe!r} and this jaxlib")
    TABLE.write_text(markdown(table))
    print(json.dumps({"results": [{name: one[name] for name in one if name != "choices"} for one in table]}))


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows by axis; latencies are over the reference's by XLA, of the same rounds."""
    lines = [
        "| | weights | KiB | cache, bytes a token | bits/byte | recall "
        "| XLA, µs | of reference | by | C++, µs | of reference |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    axis = ""
    for one in table:
        if one["axis"] != axis:
            axis = one["axis"]
            lines.append(f"| **{axis}** | | | | | | | | | | |")
        by, native = min(LOWERINGS, key=one["latency_s"].get), one["latency_s"].get("cpp")
        lines.append(
            f"| {one['row']} | {one['parameters']:,} | {one['weight_bytes'] / 1024:,.0f} | "
            f"{one['cache_bytes_per_token']:,.0f} | {one['bits_per_byte']:.3f} | {one['recall_accuracy']:.2f} | "
            f"{one['latency_s'][by] * 1e6:,.0f} | {one['latency_s'][by] / one['reference_latency_s']:.2f} | {by} | "
            + (f"{native * 1e6:,.0f} | {native / one['reference_latency_s']:.2f} |" if native else "| |")
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
