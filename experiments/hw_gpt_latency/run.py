"""How well the latency of whole models on a new device is predicted from a few measured ones. See README.md.

usage: python experiments/hw_gpt_latency/run.py --table hwgpt_s.parquet [--shots 3 10 50] [--seeds 6]
"""

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import kendalltau

from cosearch.core.errors import UserError
from cosearch.latency.error_card import scores
from cosearch.latency.transfer import Function, Linear, Prior, principal

POOL = 500
"""Architectures that shots are chosen from; all that were not measured are predicted."""
LATENCY = re.compile(r"lat_(.+)_med_ms")
LAYERED, COLUMNS = ("n_head", "mlp_ratio"), ("n_head", "mlp_ratio", "embed_dim", "bias")
LEAST_DEVICES = 3
"""Of a kind: one is predicted, and of what is left one after the other, to learn how devices differ."""
CLIP = 0.5
"""Of a logarithm: what a measurement differs by more from the sum over its layers tells nothing of others."""


@dataclass(frozen=True)
class Architectures:
    """N models: how many layers of each sort they have [N, sorts], and features of them, in groups [N, f]."""

    layers: np.ndarray
    features: Mapping[str, np.ndarray]
    cell: np.ndarray
    """By width and bias, within which the latency is a sum over layers."""
    group: np.ndarray
    """By width, bias and depth."""


def architectures(table: pandas.DataFrame) -> Architectures:
    """What is to be known of the models of a table."""
    heads, ratios = ([tuple(map(float, text.split("-"))) for text in table[name]] for name in LAYERED)
    sorts = sorted({one for pair in zip(heads, ratios, strict=True) for one in zip(*pair, strict=True)})
    index = {one: position for position, one in enumerate(sorts)}
    layers = np.zeros((len(table), len(sorts)))
    for row, pair in enumerate(zip(heads, ratios, strict=True)):
        for one in zip(*pair, strict=True):
            layers[row, index[one]] += 1
    width, depth, bias = table.embed_dim.to_numpy(), layers.sum(axis=1), table.bias.to_numpy(float)
    mean_heads, mean_ratio = (layers @ np.array(sorts)).T / depth
    widths = (width[:, None] == np.unique(width)).astype(float)

    def by_width(values: np.ndarray) -> np.ndarray:
        scaled = ((values - values.mean()) / (values.std() + 1e-12))[:, None]
        return np.concatenate([scaled, widths * scaled], axis=1)

    features = {
        "width": widths,
        "bias": by_width(bias),
        "depth": by_width(np.log(depth)),
        "heads": by_width(mean_heads),
        "ratio": by_width(mean_ratio),
    }
    cell, group = (
        np.unique(np.column_stack(columns), axis=0, return_inverse=True)[1].ravel()
        for columns in ((width, bias), (width, bias, depth))
    )
    return Architectures(layers, features, cell, group)


def summed(latency: np.ndarray, models: Architectures) -> np.ndarray:
    """The logarithm of latencies [N] as sums over layers, by least relative errors, which frees them of noise."""
    out = np.empty(len(latency))
    for one in np.unique(models.cell):
        rows = np.flatnonzero(models.cell == one)
        x = np.column_stack([np.ones(len(rows)), models.layers[rows]]) / latency[rows, None]
        ridge = 1e-6 * len(rows) * np.diag(x.mean(axis=0) ** 2)
        weights = np.ones(len(rows))
        for _ in range(12):  # reweighted least squares, towards the least absolute errors
            weighted = x * weights[:, None]
            layer_s = np.linalg.solve(weighted.T @ x + ridge * weights.mean(), weighted.sum(axis=0))
            error = np.abs(x @ layer_s - 1)
            weights = 1 / np.maximum(error, max(0.3 * np.median(error), 1e-3))
        out[rows] = np.log(np.maximum((x @ layer_s) * latency[rows], 1e-3 * latency[rows].min()))
    return out


def confirmed(rests: np.ndarray) -> np.ndarray:
    """The part of each device's rest [devices, N], what no sum over layers gives, that the other devices' predict."""
    clipped, out = np.clip(rests, -CLIP, CLIP), np.zeros_like(rests)
    gram = clipped @ clipped.T
    for device in range(len(rests)):
        others = np.arange(len(rests)) != device
        if not others.any():
            continue
        scale = np.sqrt(np.diag(gram)[others]) + 1e-12
        correlated = gram[np.ix_(others, others)] / np.outer(scale, scale) + 0.02 * np.eye(others.sum())
        out[device] = np.linalg.solve(correlated, gram[others, device] / scale) / scale @ clipped[others]
    return out


def function_of(sums: np.ndarray, rests: np.ndarray, models: Architectures) -> Function:
    """A device that is not measured, from `sums` and `rests` [devices, N] of those that are."""
    level = sums.mean(axis=1, keepdims=True)
    mean = (sums - level).mean(axis=0)
    blocks = (
        Linear("scale", np.full((len(mean), 1), 2.0), amplitude=1.0, learnt=False),  # any speed at all
        Linear("devices", principal(sums - level - mean), amplitude=1.0),
        Linear("rests", principal(confirmed(rests)), amplitude=1.0),
        *(Linear(name, columns, amplitude=0.02) for name, columns in models.features.items()),
    )
    return Function(mean + level.mean(), blocks)


def learn(sums: np.ndarray, rests: np.ndarray, models: Architectures, shots: Sequence[int]) -> Prior:
    """How devices differ, from leaving out one measured device after the other."""
    every, measured = np.arange(sums.shape[1]), []
    for device in range(len(sums)):
        others = np.arange(len(sums)) != device
        measured.append((function_of(sums[others], rests[others], models), every, sums[device] + rests[device]))
    return Prior.fit(measured, shots)


def read(path: Path) -> tuple[Architectures, dict[str, np.ndarray], dict[str, str]]:
    """The models of a table, the latencies of each device, and which kind of device each is.

    Raises:
        UserError: it is no such table, or of too few devices of a kind.
    """
    where = f"--table {path}"
    try:
        table = pandas.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
    for column in COLUMNS:
        if column not in table:
            raise UserError(f"{where}: the column {column!r} is missing. There are: {', '.join(map(str, table))}")
    try:
        models = architectures(table)
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{where}: {' and '.join(LAYERED)} have a number for each layer ('4-8-4'), the others one number: {error}"
        ) from None
    latency = {}
    for column in map(str, table):
        if found := LATENCY.fullmatch(column):
            latency[found[1]] = pandas.to_numeric(table[column], errors="coerce").to_numpy(float)
            if not (latency[found[1]] > 0).all():
                raise UserError(f"{where}: the column {column!r} has what is no latency; allowed are positive numbers")
    kinds = {name: "cpu" if "cpu" in name else "gpu" for name in latency}
    counts = Counter(kinds.values())
    if not counts or min(counts.values()) < LEAST_DEVICES:
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
        raise UserError(
            f"{where}: has columns lat_<device>_med_ms of these devices: {told}. Of a kind, cpu by its name or else "
            f"gpu, at least {LEAST_DEVICES} are needed"
        )
    return models, latency, kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, type=Path)
    parser.add_argument("--shots", type=int, nargs="+", default=[3, 10, 50])
    parser.add_argument("--seeds", type=int, default=6)
    arguments = parser.parse_args()
    models, latency, kinds = read(arguments.table)
    sums = {name: summed(values, models) for name, values in latency.items()}
    rests = {name: np.log(latency[name]) - sums[name] for name in latency}
    console, results = Console(stderr=True), []
    for device in track(list(latency), "leaving out", console=console):
        same = [name for name in latency if name != device and kinds[name] == kinds[device]]
        own, left = np.stack([sums[name] for name in same]), np.stack([rests[name] for name in same])
        prior, function = learn(own, left, models, arguments.shots), function_of(own, left, models)
        logarithms, found = np.log(latency[device]), defaultdict(list)
        for seed in range(arguments.seeds):
            pool = np.random.default_rng(seed).permutation(len(logarithms))[:POOL]
            chosen = prior.choose(function, pool, max(arguments.shots))
            for count in arguments.shots:
                taken = chosen[:count]
                rest = np.setdiff1d(np.arange(len(logarithms)), taken)
                mean, deviation = prior.adapt(function, taken, logarithms[taken]).predict(rest)
                truth, group = logarithms[rest], models.group[rest]
                within = [kendalltau(mean[group == one], truth[group == one]).statistic for one in np.unique(group)]
                found[count].append(scores(mean, deviation, truth) | {"tau_within": np.mean(within)})
        for count, each in found.items():
            means = {key: round(float(np.mean([one[key] for one in each])), 4) for key in each[0]}
            results.append({"device": device, "kind": kinds[device], "shots": count, **means})
    figures = ("mape", "tau", "tau_within", "coverage")
    shown = Table("device", "shots", "MAPE", "Kendall's tau", "within width, depth, bias", "in 90 % interval")
    for one in results:
        shown.add_row(one["device"], str(one["shots"]), *(str(one[key]) for key in figures))
    for kind in sorted(set(kinds.values())):
        for count in arguments.shots:
            own = [one for one in results if one["kind"] == kind and one["shots"] == count]
            shown.add_row(f"mean {kind}", str(count), *(f"{np.mean([one[key] for one in own]):.4f}" for key in figures))
    console.print(shown)
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"hw_gpt_latency: {error}")
