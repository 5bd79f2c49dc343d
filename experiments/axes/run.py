"""Every variant, format and pattern on one small model: what each costs and what it gives.

    python experiments/axes/run.py            # about 30 minutes on 2 cores; what is done is kept, so it can be stopped
    python experiments/axes/run.py --report   # write table.md from results.jsonl

Each row changes one thing of the default space's reference model (3 layers of width 128). Trainings, evaluations and
timings run for real; README.md says what the columns are and why the figures that surprise are as they are.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from rich.progress import track

from cosearch import axes
from cosearch.architecture.cache import zeros
from cosearch.architecture.decoder import params_spec, plain_decoder
from cosearch.core.candidate import Candidate, Value
from cosearch.core.space import Space
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.measure import timing
from cosearch.measure.bench import Bench, Compiled
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


@dataclass(frozen=True)
class Row:
    """What is changed of the reference, and whether a recovery follows."""

    axis: str
    name: str
    choices: Mapping[str, Value]
    recovered: bool = False


def rows() -> list[Row]:
    """All rows, the reference first."""
    found = [Row("architecture", "mha (the reference)", {})]

    def add(axis: str, name: str, recovered: bool = False, **choices: Value) -> None:
        found.append(Row(axis, name, {key.replace("__", "."): value for key, value in choices.items()}, recovered))

    attention = "architecture__attention"
    add("architecture", "mha, no QK-norm", architecture__qk_norm=False)
    add("architecture", "gqa, 2 KV heads", **{attention: "gqa", "architecture__kv_heads": 2})
    add("architecture", "mqa", **{attention: "mqa"})
    add("architecture", "mla, latent 32", **{attention: "mla", "architecture__latent": 32})
    add("architecture", "mla, latent 64", **{attention: "mla", "architecture__latent": 64})
    add("architecture", "sliding_window 64", **{attention: "sliding_window", "architecture__window": 64})
    add(
        "architecture",
        "sliding_window 64 + 4 sinks",
        **{attention: "sliding_window", "architecture__window": 64, "architecture__sinks": 4},
    )
    add(
        "architecture",
        "local_global 2:1, window 64",
        **{attention: "local_global", "architecture__window": 64, "architecture__locals_per_global": 2},
    )
    add("architecture", "gated_delta", **{attention: "gated_delta"})
    add("architecture", "gated_delta, gated_delta, mha", **{attention: ("gated_delta", "gated_delta", "mha")})
    add("architecture", "mha, cross_layer, mha", **{attention: ("mha", "cross_layer", "mha")})
    add("architecture", "mha, none, mha", **{attention: ("mha", "none", "mha")})
    add("architecture", "half the heads in layer 1", architecture__heads_ratio=(1, 0.5, 1))
    add("architecture", "gelu", architecture__feedforward="gelu")
    add("architecture", "moe, 2 of 4 experts + shared", architecture__feedforward="moe")
    add("architecture", "swiglu, none, swiglu", architecture__feedforward=("swiglu", "none", "swiglu"))

    weights = ("bfloat16", "float8_e4m3", "int8", "int4_g128", "int4_g64", "int4_g32", "mxfp4", "nvfp4")
    for name in weights:
        add("precision", f"weights {name}", precision__weights=name)
    for method in ("mse", "gptq", "awq"):
        add("precision", f"weights int4_g128, {method}", precision__weights="int4_g128", precision__calibration=method)
    add("precision", "weights int4_g128, recovered", True, precision__weights="int4_g128")
    add("precision", "weights mxfp4, recovered", True, precision__weights="mxfp4")
    add("precision", "W8A8", precision__weights="int8", precision__matmul_inputs="int8")
    add("precision", "W4A8 (int4_g32)", precision__weights="int4_g32", precision__matmul_inputs="int8")
    for name in ("bfloat16", "float8_e4m3", "int8", "int4"):
        add("precision", f"cache {name}", precision__kv_cache=name)
    add("precision", "activations bfloat16", precision__activations="bfloat16", precision__kv_cache="bfloat16")

    for kept in (0.75, 0.5):
        for criterion in ("magnitude", "wanda"):
            name = f"channels x {kept:g}, {criterion}"
            chosen = {"sparsity__channels_kept": kept, "sparsity__heads_kept": 1, "sparsity__criterion": criterion}
            add("sparsity", name, sparsity__pattern="structured", **chosen)
    half = {"sparsity__pattern": "structured", "sparsity__channels_kept": 1, "sparsity__criterion": "wanda"}
    add("sparsity", "heads x 0.5, wanda", sparsity__heads_kept=0.5, **half)
    add("sparsity", "heads x 0.5, wanda, recovered", True, sparsity__heads_kept=0.5, **half)
    add("sparsity", "2 of 3 layers, wanda", sparsity__layers_kept=2 / 3, sparsity__heads_kept=1, **half)
    add(
        "sparsity", "2 of 3 layers, wanda, recovered", True, sparsity__layers_kept=2 / 3, sparsity__heads_kept=1, **half
    )
    for n_m in ("2:4", "4:8", "1:4"):
        for criterion in ("magnitude", "wanda", "sparsegpt"):
            chosen = {"sparsity__pattern": "n_m", "sparsity__n_m": n_m, "sparsity__criterion": criterion}
            add("sparsity", f"{n_m}, {criterion}", **chosen)
        add("sparsity", f"{n_m}, sparsegpt, recovered", True, **chosen)
    for criterion in ("magnitude", "wanda"):
        chosen = {"sparsity__pattern": "block", "sparsity__blocks_kept": 0.5, "sparsity__criterion": criterion}
        add("sparsity", f"half the blocks of 16, {criterion}", **chosen)
    add("sparsity", "half the blocks of 16, wanda, recovered", True, **chosen)
    for kept in (2, 4, 8):
        chosen = {"sparsity__attention": "block_topk", "sparsity__attention_kept": kept}
        add("sparsity", f"attention to {kept} + 1 blocks of 16", **chosen)
    add(
        "joint",
        "2:4 of int8, cache int8",
        precision__weights="int8",
        precision__kv_cache="int8",
        sparsity__pattern="n_m",
    )
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


def quality(one: Candidate, row: Row, recipe: Recipe, text: corpus.Corpus) -> dict[str, Any]:
    """What is stored, and how good it is."""
    recipe = recipe if row.recovered else recipe.unrecovered
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
    """Each row's decode step by two lowerings, verified and then timed side by side with the reference's."""
    workload = Workload("axes", (OperatingPoint("decode", 1, CONTEXT),))
    lowerings = ({"matmul": "dot"}, {"matmul": "multiply_reduce", "attention": "multiply_reduce"})
    compiled: list[Compiled] = []
    for row in group:
        for lowering in lowerings:
            bench, one = Bench(), candidate(space, row, **lowering)
            bench.compile(one, workload)
            bench.verify(one)
            compiled += bench.programs
    samples = timing.side_by_side([one.step() for one in compiled], ROUNDS)
    medians = [timing.median_interval(one) for one in samples]
    found = []
    for index in range(len(group)):
        own = medians[2 * index : 2 * index + 2]
        best = min(own)
        found.append(
            {
                "latency_s": {"dot": own[0][0], "multiply_reduce": own[1][0]},
                "best_latency_s": best[0],
                "interval_s": best[1],
                "reference_latency_s": min(medians[0], medians[1])[0],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recovered", help="a file of conf/quality")
    parser.add_argument("--report", action="store_true", help="only write the table of what is done")
    parser.add_argument("--only", default="", help="only rows whose name holds this")
    options = parser.parse_args()
    done = {one["row"]: one for one in map(json.loads, RESULTS.read_text().splitlines())} if RESULTS.is_file() else {}
    if not options.report:
        recipe = Recipe.from_json(yaml.safe_load((CONF / "quality" / f"{options.recipe}.yaml").read_text()))
        space, text = axes.load_space("llm_decode_full", target="cpu"), corpus.load("python")
        wanted = [row for row in rows() if options.only in row.name and row.name not in done]
        candidates = {row.name: candidate(space, row) for row in wanted}
        scores = {}
        for row in track(wanted, "training and evaluating"):
            scores[row.name] = quality(candidates[row.name], row, recipe, text)
        for first in track(range(0, len(wanted), TIMED_TOGETHER), "verifying and timing"):
            group = wanted[first : first + TIMED_TOGETHER]
            for row, timed in zip(group, latencies(space, [rows()[0], *group])[1:], strict=True):
                done[row.name] = {
                    "row": row.name,
                    "axis": row.axis,
                    "choices": dict(row.choices),
                    **scores[row.name],
                    **timed,
                    "context": CONTEXT,
                    "uid": candidates[row.name].uid,
                    "processor": fingerprint()["processor"],
                    "jaxlib": fingerprint()["jaxlib"],
                }
                with RESULTS.open("a") as file:
                    file.write(json.dumps(done[row.name]) + "\n")
    table = [done[row.name] for row in rows() if row.name in done]
    TABLE.write_text(markdown(table))
    print(json.dumps({"results": [{key: one[key] for key in one if key != "choices"} for one in table]}))


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows by axis; latency is the better of two lowerings', over the reference's of the same round."""
    lines = [
        "| | weights | KiB | cache, bytes a token | bits/byte | recall | decode, µs | of reference | by |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    axis = ""
    for one in table:
        if one["axis"] != axis:
            axis = one["axis"]
            lines.append(f"| **{axis}** | | | | | | | | |")
        lines.append(
            f"| {one['row']} | {one['parameters']:,} | {one['weight_bytes'] / 1024:,.0f} | "
            f"{one['cache_bytes_per_token']:,.0f} | {one['bits_per_byte']:.3f} | {one['recall_accuracy']:.2f} | "
            f"{one['best_latency_s'] * 1e6:,.0f} | {one['best_latency_s'] / one['reference_latency_s']:.2f} | "
            f"{min(one['latency_s'], key=one['latency_s'].get)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
