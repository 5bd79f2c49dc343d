"""What the study of whole models on other devices refuses."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest

from cosearch.core.errors import UserError

RUN = Path(__file__).parents[2] / "experiments" / "hw_gpt_latency" / "run.py"
STUDY = runpy.run_path(str(RUN))


def table(gpus: int, cpus: int, rows: int = 60) -> pandas.DataFrame:
    """Models whose latencies are a sum over layers, on devices of several speeds."""
    rng = np.random.default_rng(0)
    depth = rng.choice([2, 3], rows)
    heads, ratios = ([rng.choice(some, count) for count in depth] for some in ([4, 8], [2, 4]))
    found = {
        "n_head": ["-".join(map(str, one)) for one in heads],
        "mlp_ratio": ["-".join(map(str, one)) for one in ratios],
        "embed_dim": rng.choice([256, 512], rows),
        "bias": rng.choice([True, False], rows),
    }
    layers = np.array([h.sum() + 3 * r.sum() for h, r in zip(heads, ratios, strict=True)], float)
    names = [*(f"gpu{index}" for index in range(gpus)), *(f"cpu{index}" for index in range(cpus))]
    for index, name in enumerate(names):
        found[f"lat_{name}_med_ms"] = (1 + index) * found["embed_dim"] / 256 * (5 + layers)
    return pandas.DataFrame(found)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (table(3, 1), "of these devices: 1 cpu, 3 gpu. .* at least 3"),
        (table(0, 0), "of these devices: none"),
        (table(3, 0).drop(columns="bias"), "the column 'bias' is missing. There are: n_head"),
        (table(3, 0).drop(columns="n_head"), "the column 'n_head' is missing"),
        (table(3, 0).assign(n_head=8), "n_head and mlp_ratio have a number for each layer"),
        (table(3, 0).assign(lat_gpu1_med_ms="fast"), "'lat_gpu1_med_ms' has what is no latency"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, made: pandas.DataFrame, says: str):
    made.to_parquet(tmp_path / "table.parquet")
    with pytest.raises(UserError, match=says):
        STUDY["read"](tmp_path / "table.parquet")


def test_it_predicts_devices_that_were_left_out(tmp_path: Path):
    table(3, 0).to_parquet(tmp_path / "table.parquet")
    command = [sys.executable, str(RUN), "--table", str(tmp_path / "table.parquet"), "--shots", "3", "--seeds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)["results"]
    assert [(one["device"], one["kind"], one["shots"]) for one in results] == [(f"gpu{i}", "gpu", 3) for i in range(3)]
    assert all(one["mape"] < 0.1 and {"tau", "tau_within", "coverage"} <= one.keys() for one in results)
