"""How well the latency of whole candidates is predicted on this processor, from measuring some of them.

    python experiments/cpu_latency/run.py --candidates 120    # what is done is kept, so it can be stopped
    python experiments/cpu_latency/run.py --report            # only predict, from results.jsonl
    python experiments/cpu_latency/run.py --pretrain          # train the network that ships, on measured.parquet

README.md says what the figures are and how they came out.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from scipy.optimize import nnls
from scipy.stats import kendalltau

from cosearch import axes
from cosearch.__main__ import compose
from cosearch.core.candidate import Candidate
from cosearch.core.errors import Rejected
from cosearch.core.metric import Metric
from cosearch.core.problem import Problem
from cosearch.core.space import Space
from cosearch.core.target import Target
from cosearch.core.trial import Failure, Stage, Trial
from cosearch.latency import roofline
from cosearch.latency.batch import Operations
from cosearch.latency.features import work
from cosearch.latency.model import LatencyModel
from cosearch.latency.network import RateNetwork, Seconds, rates
from cosearch.latency.pretrain import Examples, train
from cosearch.measure.fingerprint import fingerprint
from cosearch.measure.process import Worker
from cosearch.paths import cache_dir
from cosearch.proposers import PROPOSERS, Setting
from cosearch.settings import Settings
from cosearch.stages import Compile, Measure, Static, latency_key
from cosearch.targets import TARGETS

HERE = Path(__file__).parent
RESULTS, MEASURED = HERE / "results.jsonl", HERE / "measured.parquet"
KEPT = 24
"""Samples of a measurement that a row has; the figure and its interval are of all of them."""
STUDIED = 120
"""The candidates that the study is of: half to fit to, half to predict. The network that ships has not seen them."""


def settings() -> Settings:
    """What the default search searches."""
    return Settings.from_config(compose(["experiment=llm_decode"]))


def problem_here(chosen: Settings, worker: Worker) -> Problem:
    """Its problem on the processor at hand."""
    target = TARGETS[chosen.target].target(cache_dir(), lambda: worker.call("peaks", {}, chosen.limits.measure_s))
    return Problem(target, chosen.workload, chosen.objectives, chosen.constraints)


def results(path: Path = RESULTS) -> list[tuple[Trial, Target]]:
    """What is measured so far, in that order; a candidate may be there twice."""
    found, place = [], {}
    for row in map(json.loads, path.read_text().splitlines()) if path.is_file() else ():
        place |= {name: row[name] for name in _PLACE if name in row}
        trial = {"latency_key": "", "quality_key": "", "predictions": {}, "reused": (), **place, **row}
        found.append((Trial.from_json(trial), Target.from_json(place["target"])))
    return found


_PLACE = ("fingerprint", "target")
"""Of a row: told where they differ from the row before."""


def append(path: Path, trial: Trial, target: Target, before: tuple[Trial, Target] | None) -> None:
    """Add a row to those of `path`."""
    told = trial.to_json() | {"target": target.to_json()}
    row = {name: told[name] for name in ("point", "metrics", "failure", "seconds")}
    last = {} if before is None else {"fingerprint": before[0].fingerprint, "target": before[1].to_json()}
    row |= {name: told[name] for name in _PLACE if told[name] != last.get(name)}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def drawn(space: Space, problem: Problem, seed: int) -> Iterator[Candidate]:
    """Random legal candidates, each once."""
    proposer = PROPOSERS["random"](Setting(space, problem, seed, {}))
    while found := proposer.ask(50):
        yield from found


def score(candidate: Candidate, problem: Problem, stages: list[Stage]) -> Trial:
    """Compile and measure one, as a search does."""
    metrics, failure, seconds = {}, None, {}
    for stage in stages:
        start = monotonic()
        try:
            metrics |= stage(candidate, problem)
        except Rejected as rejection:
            failure = Failure(stage.name, str(rejection))
        seconds[stage.name] = round(monotonic() - start, 3)
        if failure:
            break
    kept = {name: shortened(metrics[name]) for name in ("latency_s", "memory_bytes") if name in metrics}
    return Trial(candidate, latency_key(candidate, problem), "", kept, {}, failure, seconds, fingerprint=fingerprint())


def shortened(metric: Metric) -> Metric:
    """With at most `KEPT` samples, evenly over the time of measuring, of the five digits that a clock tells."""
    every = -(-len(metric.samples) // KEPT) or 1
    return replace(metric, samples=tuple(float(f"{sample:.5g}") for sample in metric.samples[::every]))


def measure(chosen: Settings, path: Path, candidates: int, again: int, seed: int) -> None:
    """Measure until so many candidates succeeded, then the first of them `again`; append each to the rows of `path`.
    Those of `RESULTS` are in no other file."""
    space = chosen.load_space()
    with Worker() as worker, Progress() as progress:
        problem = problem_here(chosen, worker)
        limits = chosen.limits
        stages = [
            Static(),
            Compile(worker, limits.compile_s),
            Measure(worker, limits.measure_s, chosen.measure_seconds),
        ]
        rows = results(path)
        done = [trial for trial, _ in rows]
        known = {trial.uid for trial, _ in (*rows, *results())}
        times = [trial.uid for trial in done if trial.failure is None]
        task = progress.add_task("measuring", total=candidates + again, completed=len(times))

        def add(candidate: Candidate) -> Trial:
            trial = score(candidate, problem, stages)
            append(path, trial, problem.target, rows[-1] if rows else None)
            rows.append((trial, problem.target))
            progress.update(task, advance=trial.failure is None)
            return trial

        first = [trial.candidate for trial in done if trial.failure is None]
        proposals = drawn(space, problem, seed)
        while len(set(times)) < candidates:
            candidate = next(proposals)
            if candidate.uid in known:
                continue
            trial = add(candidate)
            if trial.failure is None:
                times.append(trial.uid)
                first.append(candidate)
        for candidate in first[:again]:
            if times.count(candidate.uid) < 2:
                add(candidate)


def once(done: Sequence[tuple[Trial, Target]]) -> list[Trial]:
    """The first measurement of each candidate that did not fail, in that order."""
    found: dict[str, Trial] = {}
    for trial, _ in done:
        if trial.failure is None:
            found.setdefault(trial.uid, trial)
    return list(found.values())


def latencies(trials: Sequence[Trial]) -> np.ndarray:
    """Measured seconds a token."""
    return np.array([trial.metrics["latency_s"].value for trial in trials])


def pack(paths: Sequence[Path]) -> None:
    """Add the candidates in files of rows to `MEASURED`, where a column is a knob, its values as JSON."""
    found = [pd.read_parquet(MEASURED)] if MEASURED.is_file() else []
    for path in paths:
        rows = [
            {name: json.dumps(value) for name, value in trial.candidate.point.items()}
            | {"latency_s": trial.metrics["latency_s"].value, "contended": trial.metrics["latency_s"].contended}
            | {"processor": trial.fingerprint["processor"], "target": json.dumps(target.to_json())}
            for trial, target in results(path)
            if trial.failure is None
        ]
        found.append(pd.DataFrame(rows))
    told = pd.concat(found, ignore_index=True)
    knobs = [name for name in told.columns if told[name].dtype == object or told[name].dtype == "str"]
    told.astype(dict.fromkeys(knobs, "category")).to_parquet(MEASURED, compression="zstd", index=False)


def examples(operations: Operations) -> list[Examples]:
    """What `MEASURED` has of quiet machines, without the `STUDIED`, by processor."""
    studied = {trial.uid for trial in once(results())[:STUDIED]}
    found = []
    for (processor, target), own in pd.read_parquet(MEASURED).groupby(["processor", "target"], observed=True):
        candidates, seconds = [], []
        for row in own.drop(columns=["processor", "target"]).to_dict("records"):
            latency_s, contended = row.pop("latency_s"), row.pop("contended")
            point = {name: json.loads(value) for name, value in row.items() if isinstance(value, str)}
            candidate = Candidate.from_point(point)
            if not contended and candidate.uid not in studied:
                candidates.append(candidate)
                seconds.append(latency_s)
        rows = operations.encoding.rows(candidates)
        found.append(Examples(rows, np.array(seconds), Target.from_json(json.loads(target)), str(processor)))
    return found


def pretrain(chosen: Settings, left_out: int) -> None:
    """Train on all `examples`, and write what ships; or without some of each processor, and tell how well those are
    predicted."""
    [point] = chosen.workload.points
    operations = Operations(chosen.load_space(), point)
    seen, unseen = [], []
    for one in examples(operations):
        order = np.random.default_rng(0).permutation(len(one.rows))
        parts = (replace(one, rows=one.rows[at], seconds=one.seconds[at]) for at in np.split(order, [left_out]))
        for into, part in zip((unseen, seen), parts, strict=True):
            into.append(part)
    network = train(operations, seen)
    found = {"trained_on": {one.processor: len(one.rows) for one in seen}}
    if not left_out:
        network.save(rates("cpu"))
        print(json.dumps(found | {"file": rates("cpu").name}))
        return
    for one in unseen:
        seconds = Seconds(network, operations, one.target, one.processor)
        expected = seconds.log_seconds(operations(one.rows), operations.encoding.features(one.rows)).mean(axis=0)
        found[one.processor] = errors(np.exp(expected), one.seconds)
    print(json.dumps(found))


def table_of_layers(seen: Sequence[Trial], unseen: Sequence[Trial]) -> np.ndarray:
    """Seconds as a sum over a table with an entry for each kind of block of a layer and lowering, and one for the rest:
    the entries that fit the trials that were `seen` best, none below 0."""
    kinds: dict[str, int] = {"rest": 0}

    def row(trial: Trial) -> dict[int, float]:
        counted = {0: 1.0}
        for layer in axes.served_shape(trial.candidate).layers:
            for _, block in layer.blocks():
                at = kinds.setdefault(type(block).__name__ + trial.candidate.schedule["matmul"], len(kinds))  # pyright: ignore[reportOperatorIssue]
                counted[at] = counted.get(at, 0.0) + 1
        return counted

    rows = [row(trial) for trial in (*seen, *unseen)]
    counts = np.array([[one.get(at, 0.0) for at in range(len(kinds))] for one in rows])
    measured = latencies(seen)
    table, _ = nnls(counts[: len(seen)] / measured[:, None], np.ones(len(seen)))
    return np.maximum(counts[len(seen) :] @ table, measured.min())


def errors(predicted: np.ndarray, measured: np.ndarray, interval: Sequence[np.ndarray] = ()) -> dict[str, float]:
    """Mean and median absolute error relative to what was measured, Kendall's tau, and how many the interval covers."""
    off = np.abs(predicted / measured - 1)
    found = {"mape": off.mean(), "median": np.median(off), "tau": kendalltau(predicted, measured)[0]}
    if interval:
        found["coverage"] = np.mean((interval[0] <= measured) & (measured <= interval[1]))
    return {name: float(value) for name, value in found.items()}


def study(chosen: Settings, splits: int) -> dict[str, Any]:
    """Fit to random halves of the first `STUDIED` and predict the others, by each method; means over the splits."""
    done = results()
    trials, space = once(done)[:STUDIED], chosen.load_space()
    problem = Problem(done[0][1], chosen.workload, chosen.objectives, chosen.constraints)
    starts = {"pretrained": RateNetwork.load("cpu"), "roofline": RateNetwork.untrained()}
    found: dict[str, list[dict[str, float]]] = {}
    for split in range(splits):
        order = np.random.default_rng(split).permutation(len(trials))
        seen, unseen = ([trials[at] for at in part] for part in np.array_split(order, 2))
        measured, candidates = latencies(unseen), [trial.candidate for trial in unseen]
        for start, network in starts.items():
            model = LatencyModel(space, problem, network)
            before = model.predict(candidates)["latency_s"].quantile(0.0)
            found.setdefault(f"{start}, nothing seen", []).append(errors(before, measured))
            model.fit(seen)
            fitted = model.predict(candidates)
            found.setdefault(f"{start}, {len(seen)} seen", []).append(
                errors(
                    fitted["latency_s"].quantile(0.0),
                    measured,
                    [fitted["latency_s"].quantile(z) for z in (-1.645, 1.645)],
                )
            )
            memory = np.array([trial.metrics["memory_bytes"].value for trial in unseen])
            found.setdefault(f"memory, {start}, {len(seen)} seen", []).append(
                errors(
                    fitted["memory_bytes"].quantile(0.0),
                    memory,
                    [fitted["memory_bytes"].quantile(z) for z in (-1.645, 1.645)],
                )
            )
        floor = np.array([roofline.latency_s(one, problem.workload, problem.target) for one in candidates])
        found.setdefault("roofline formula", []).append(errors(floor, measured))
        found.setdefault("table of layers", []).append(errors(table_of_layers(seen, unseen), measured))
    means = {
        method: {name: float(np.mean([one[name] for one in each])) for name in each[0]}
        for method, each in found.items()
    }
    return {"candidates": len(trials), "splits": splits, "methods": means, "repeated": repeated(done)}


def repeated(done: Sequence[tuple[Trial, Target]]) -> dict[str, float]:
    """How well a measurement predicts another one of the same candidate: no model can be told to do better."""
    by_uid: dict[str, list[float]] = {}
    for trial, _ in done:
        if trial.failure is None:
            by_uid.setdefault(trial.uid, []).append(trial.metrics["latency_s"].value)
    twice = np.array([values[:2] for values in by_uid.values() if len(values) > 1])
    return {"candidates": len(twice), **errors(twice[:, 0], twice[:, 1])} if len(twice) > 1 else {"candidates": 0}


def throughput(chosen: Settings, count: int = 20_000) -> dict[str, float]:
    """Distinct candidates a second, from rows of indices to latencies with intervals; at first tables are made."""
    done = results()
    problem = Problem(done[0][1], chosen.workload, chosen.objectives, chosen.constraints)
    space = chosen.load_space()
    model = LatencyModel(space, problem)
    model.fit(once(done)[: STUDIED // 2])
    proposals = drawn(space, problem, 1)
    candidates = [next(proposals) for _ in track(range(count), "drawing")]
    rows = np.unique(model.encoding.rows(candidates), axis=0)
    seconds = []
    for _ in range(6):
        start = monotonic()
        model.predict_rows(rows, ("latency_s",))
        seconds.append(monotonic() - start)
    start = monotonic()
    for candidate in candidates[:500]:
        work(candidate, problem.workload.points[0])
        roofline.latency_s(candidate, problem.workload, problem.target)
    one_by_one = (monotonic() - start) / 500
    return {
        "distinct": len(rows),
        "per_s_first_time": len(rows) / seconds[0],
        "per_s": len(rows) / float(np.median(seconds[1:])),
        "per_s_best": len(rows) / min(seconds),
        "per_s_counted_one_by_one": 1 / one_by_one,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=120)
    parser.add_argument("--again", type=int, default=15, help="how many of them are measured a second time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, default=RESULTS, help="the file that measurements are added to")
    parser.add_argument("--pack", type=Path, nargs="+", help="only add files of rows to what the network is trained on")
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--pretrain", action="store_true", help="only train the network that ships")
    parser.add_argument("--left-out", type=int, default=0, help="of each processor, to see how well they are predicted")
    parser.add_argument("--throughput", action="store_true", help="only see how many candidates a second are scored")
    options = parser.parse_args()
    chosen = settings()
    if options.pack:
        return pack(options.pack)
    if options.pretrain:
        return pretrain(chosen, options.left_out)
    if options.throughput:
        print(json.dumps(throughput(chosen)))
        return None
    if not options.report:
        measure(chosen, options.rows, options.candidates, options.again, options.seed)
    found = study(chosen, options.splits)
    table = Table("method", "MAPE", "median", "tau", "covered")
    for name, figures in found["methods"].items():
        told = (f"{figures[key]:.3f}" if key in figures else "" for key in ("mape", "median", "tau", "coverage"))
        table.add_row(name, *told)
    Console().print(table)
    print(json.dumps(found))
    return None


if __name__ == "__main__":
    main()
