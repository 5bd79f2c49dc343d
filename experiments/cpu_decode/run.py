"""How near decoding on this CPU comes to what its memory allows, beside llama.cpp, vLLM and plain JAX. See README.md.

usage: python experiments/cpu_decode/run.py --peer-python PATH [--vllm-python PATH] [--rounds 5] [--only NAME ...]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

HERE = Path(__file__).parent
SHAPES = {
    "142M": {"width": 1024, "layers": 12, "heads": 16, "kv_heads": 8, "hidden": 2816},
    "1.1B": {"width": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "hidden": 5632},
}
PEER_TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
CELLS = [("142M", name) for name in PEER_TYPES] + [("1.1B", name) for name in ("int8", "int4")]
CONTEXTS = (16, 1024, 4096)
BATCHES = (8, 32)
PREFILL = 512
READ_BYTES = 256 * 1024 * 1024
"""That a measurement of the bandwidth reads."""
CACHE_BYTES = 2
"""Of a number in the caches of both sides: bfloat16 here, float16 in llama.cpp."""


class Side:
    """A process that answers requests (`side.py`)."""

    def __init__(self, python: str, *arguments: str) -> None:
        # Large pages keep the processor from looking pages up: a third of the bandwidth. glibc asks for them when told.
        # And JAX runs programs in the thread that calls them. Both as in the workers of a search.
        environment = {
            **os.environ,
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
            "JAX_PLATFORMS": "cpu",
        }
        self._process = subprocess.Popen(
            [python, *arguments], cwd=HERE, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._read()

    def __call__(self, do: str, **arguments: int) -> list[float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._read()["seconds"]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self._process.args))} ended")  # type: ignore[arg-type]
        return json.loads(line)


def interleave(sides: dict[str, Any], rounds: int, rng: np.random.Generator) -> dict[str, list[float]]:
    """Each side's means of every round, in which all take a turn in random order. Means, for peers tell no more."""
    means = defaultdict(list)
    for _ in range(rounds):
        for name in rng.permutation(list(sides)):
            means[name].append(float(np.mean(sides[name]())))
    return means


def median_rate(seconds: Sequence[float], batch: int = 1) -> float:
    return round(batch / float(np.median(seconds)), 2)


def must_read(sizes: dict[str, int], form: str, context: int) -> float:
    """What a decode step must read: all weights but the embedding's other rows, and the cache up to the context."""
    width, head_dim = sizes["width"], sizes["width"] // sizes["heads"]
    layer = 2 * width * width + 2 * width * sizes["kv_heads"] * head_dim + 3 * width * sizes["hidden"]
    weights = layer * sizes["layers"] + width * 256
    bits = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4.5}[form]
    return weights * bits / 8 + 2 * context * sizes["kv_heads"] * head_dim * sizes["layers"] * CACHE_BYTES


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer-python", help="a Python with xllamacpp and gguf")
    parser.add_argument("--vllm-python", help="a Python with vLLM for CPUs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--only", nargs="*", help="shape/format, for example 142M/int8 or 142M/batch")
    options = parser.parse_args()
    console, rng = Console(stderr=True), np.random.default_rng(0)
    results: list[dict[str, Any]] = []
    bandwidths: list[float] = []
    wanted = lambda shape, form: not options.only or f"{shape}/{form}" in options.only  # noqa: E731
    models = Path(tempfile.gettempdir()) / "cosearch-cpu-decode"
    models.mkdir(exist_ok=True)

    def ours(shape: str, form: str, batch: int = 1, *more: str) -> Side:
        return Side(sys.executable, "ours.py", json.dumps(SHAPES[shape]), form, str(batch), *more)

    def record(entry: dict[str, Any], seconds: dict[str, list[float]]) -> None:
        results.append(entry)
        with (HERE / "results.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.strftime("%FT%TZ", time.gmtime()), **entry, "seconds": seconds}) + "\n")
        console.print(entry)

    for shape, form in CELLS:
        if not wanted(shape, form):
            continue
        sides = {"ours": ours(shape, form), "plain": ours(shape, form, 1, "plain")}
        if options.peer_python:
            path = models / f"{shape}-{form}.gguf"
            sizes = json.dumps(SHAPES[shape])
            sides["peer"] = Side(options.peer_python, "peer_llama_cpp.py", str(path), sizes, PEER_TYPES[form])
        prefill = interleave(
            {name: lambda one=one: one("prefill", tokens=PREFILL) for name, one in sides.items() if name != "plain"},
            max(2, options.rounds // 2), rng,
        )  # fmt: skip
        for context in CONTEXTS:
            turns: dict[str, Any] = {
                name: lambda one=one, name=name, context=context: one(
                    "decode", context=context, tokens=3 if name == "plain" else options.tokens
                )
                for name, one in sides.items()
            }
            turns["bandwidth"] = lambda one=sides["ours"]: one("bandwidth", read_bytes=READ_BYTES)
            for turn in turns.values():
                turn()
            seconds = interleave(turns, options.rounds, rng)
            bandwidth = READ_BYTES / float(np.median(seconds["bandwidth"])) / 1e9
            bandwidths.append(bandwidth)
            entry = {
                "shape": shape,
                "format": form,
                "context": context,
                "batch": 1,
                "ours_tok_s": median_rate(seconds["ours"]),
                "peer_tok_s": median_rate(seconds["peer"]) if "peer" in seconds else None,
                "plain_jax_tok_s": median_rate(seconds["plain"]),
                "read_bandwidth_gb_s": round(bandwidth, 1),
                "bandwidth_fraction": round(
                    must_read(SHAPES[shape], form, context) / float(np.median(seconds["ours"])) / (bandwidth * 1e9), 3
                ),
                "prefill_ours_tok_s": median_rate(prefill["ours"], PREFILL),
                "prefill_peer_tok_s": median_rate(prefill["peer"], PREFILL) if "peer" in prefill else None,
            }
            record(entry, {**seconds, **{f"prefill_{name}": one for name, one in prefill.items()}})
        for one in sides.values():
            one.stop()

    if wanted("142M", "batch"):
        vllm = None
        if options.vllm_python:
            vllm = Side(options.vllm_python, "peer_vllm.py", str(models / "vllm"), json.dumps(SHAPES["142M"]))
        for batch in BATCHES:
            for form in ("bfloat16", "int8"):
                side = ours("142M", form, batch)
                turns = {"ours": lambda side=side: side("decode", context=1024, tokens=options.tokens)}
                turns["bandwidth"] = lambda side=side: side("bandwidth", read_bytes=READ_BYTES)
                if vllm is not None:
                    turns["peer"] = lambda batch=batch: vllm("decode", context=1024, batch=batch, tokens=options.tokens)
                seconds = interleave(turns, options.rounds, rng)
                bandwidths.append(READ_BYTES / float(np.median(seconds["bandwidth"])) / 1e9)
                entry = {
                    "shape": "142M",
                    "format": form,
                    "context": 1024,
                    "batch": batch,
                    "ours_tok_s": median_rate(seconds["ours"], batch),
                    "peer_tok_s": median_rate(seconds["peer"], batch) if vllm is not None else None,
                }
                record(entry, dict(seconds))
                side.stop()
        if vllm is not None:
            vllm.stop()
    print(json.dumps({"read_bandwidth_gb_s": round(float(np.median(bandwidths)), 1), "results": results}))


if __name__ == "__main__":
    main()
