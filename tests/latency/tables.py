"""Tables of made-up GPUs whose latencies follow a rule: 80 % of the bandwidth or 70 % of the peak, and an overhead."""

from pathlib import Path

import numpy as np
import pandas

SYSTEMS = {
    "old": (2.0e12, 300e12, None, 80),
    "new": (3.3e12, 990e12, 1980e12, 90),
    "twin": (4.8e12, 990e12, 1980e12, 90),
}
SYSTEMS |= {"large": (7.7e12, 2250e12, 4500e12, 100), "small": (1.8e12, 470e12, 940e12, 120)}


def write(folder: Path, rows: int = 300, systems: tuple[str, ...] = tuple(SYSTEMS)) -> None:
    """`systems.csv` and a table of GEMMs, with an older version and rows that were measured with the power."""
    sheet = {
        "system": list(SYSTEMS),
        "gpu.mem_bw": [one[0] for one in SYSTEMS.values()],
        "gpu.bfloat16_tc_flops": [one[1] for one in SYSTEMS.values()],
        "gpu.fp8_tc_flops": [one[2] for one in SYSTEMS.values()],
        "gpu.sm_version": [one[3] for one in SYSTEMS.values()],
    }
    pandas.DataFrame(sheet).to_csv(folder / "systems.csv", index=False)
    rng, tables = np.random.default_rng(0), []
    for name in systems:
        bandwidth, wide, narrow, _ = SYSTEMS[name]
        m, n, k = (2 ** rng.integers(low, high, rows) for low, high in ((0, 13), (6, 14), (6, 14)))
        dtype = rng.choice(["bfloat16", "fp8"], rows) if narrow else np.full(rows, "bfloat16")
        size = np.where(dtype == "fp8", 1, 2)
        memory_s = (size * (n * k + m * k) + 2 * m * n) / bandwidth / 0.8
        arithmetic_s = 2.0 * m * n * k / np.where(dtype == "fp8", narrow or 1.0, wide) / 0.7
        latency_s = 3e-6 + np.maximum(memory_s, arithmetic_s)
        table = pandas.DataFrame({"gemm_dtype": dtype, "m": m, "n": n, "k": k, "latency_ms": 1e3 * latency_s})
        table = table.assign(system=name, version="1.10.0", power_W=np.nan)
        older = table.assign(version="1.9.0", latency_ms=10 * table.latency_ms)
        tables += [table, older, table.assign(version="1.11.0", power_W=500.0, latency_ms=7 * table.latency_ms)]
    pandas.concat(tables).to_parquet(folder / "gemm_made.parquet")
