"""The loop with stages in plain Python, and whole tiny searches with everything real."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cosearch.__main__ import main
from cosearch.core.archive import Archive
from cosearch.core.candidate import Candidate
from cosearch.core.errors import Rejected, UserError
from cosearch.core.metric import Metrics, measured
from cosearch.core.problem import Objective, Problem
from cosearch.core.target import Target
from cosearch.core.trial import Failure, Stage, Trial
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.report import Budget, Outcome
from cosearch.search import Predict, Scoring, confirm, search
from tests import tiny

PROBLEM = Problem(
    Target("chip", "cpu", "made up", {"float32": 1e11}, 1e10, 1 << 30, 2, 1e-6),
    Workload("tiny", (OperatingPoint("decode", 1, 32),)),
    (Objective.parse("minimize latency_s"), Objective.parse("minimize bits_per_byte")),
)


def candidate(width: int, layers: str = "scan") -> Candidate:
    return Candidate.from_point({"architecture.width": width, "schedule.layers": layers})


REFERENCE = candidate(0)


@dataclass
class FakeStage:
    """A stage that counts its calls and does what it is told to."""

    name: str
    metric: str
    depends_on: str
    act: Callable[[Candidate], None] = lambda candidate: None
    called: list[Candidate] = field(default_factory=list)

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({self.metric})

    def __call__(self, candidate: Candidate, problem: Problem) -> Metrics:
        self.called.append(candidate)
        self.act(candidate)
        width = candidate.architecture["width"]
        assert isinstance(width, int)
        return {self.metric: measured(self.metric, 1.0 + width)}


class Listed:
    """Proposes what it is given, in order, and keeps what it is told."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._left = list(candidates)
        self.asked: list[int] = []
        self.told: list[str] = []

    def ask(self, n: int) -> list[Candidate]:
        self.asked.append(n)
        chosen, self._left = self._left[:n], self._left[n:]
        return chosen

    def tell(self, trials: Sequence[Trial]) -> None:
        self.told += [trial.uid for trial in trials]


class Notes:
    """A tracker that notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def start(self, archive: Archive) -> None:
        self.heard.append(("start", len(archive)))

    def progress(self, stage: str, detail: str, fraction: float) -> None:
        self.heard.append((stage, fraction))

    def log(self, trial: Trial, archive: Archive) -> None:
        assert trial.uid in archive
        self.heard.append(("log", len(archive)))

    def finish(self, archive: Archive, outcome: Outcome) -> None:
        self.heard.append(("finish", len(archive)))


def stages(latency: Callable[[Candidate], None] = lambda candidate: None) -> tuple[FakeStage, FakeStage]:
    return (
        FakeStage("measure", "latency_s", "latency_key", latency),
        FakeStage("quality", "bits_per_byte", "quality_key"),
    )


def scoring(of: Sequence[Stage], predict: Predict = lambda candidate: {}) -> Scoring:
    return Scoring(PROBLEM, of, lambda candidate: candidate.uid, lambda candidate: candidate.quality_axes_key, predict)


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    archive = Archive(tmp_path / "trials.db", PROBLEM, REFERENCE.uid)
    yield archive
    archive.close()


def reject(chosen: Callable[[Candidate], bool]) -> Callable[[Candidate], None]:
    def act(candidate: Candidate) -> None:
        if chosen(candidate):
            raise Rejected(f"no {candidate.architecture['width']}")

    return act


def widths(archive: Archive) -> list[Any]:
    return [trial.candidate.architecture["width"] for trial in archive]


def test_the_reference_comes_first_and_the_budget_of_trials_is_exact(archive: Archive):
    proposer = Listed([candidate(width) for width in range(1, 40)])
    search(REFERENCE, scoring(stages()), proposer, archive, Budget(10, 100), [])
    assert widths(archive) == list(range(10))
    assert proposer.told == [trial.uid for trial in archive]
    assert proposer.asked == [6, 3], "it is never asked for more than the budget has left"


def test_the_budget_of_seconds_ends_the_search(archive: Archive):
    slow = stages(lambda candidate: time.sleep(0.05))
    search(REFERENCE, scoring(slow), Listed([candidate(width) for width in range(1, 40)]), archive, Budget(40, 0.2), [])
    assert 3 <= len(archive) <= 5
    assert 0.2 <= archive.seconds < 0.35


def test_a_proposer_with_nothing_new_ends_the_search(archive: Archive):
    search(REFERENCE, scoring(stages()), Listed([candidate(1), candidate(2)]), archive, Budget(40, 100), [])
    assert widths(archive) == [0, 1, 2]


def test_no_candidate_is_tried_twice(archive: Archive):
    proposals = [candidate(width) for width in (1, 0, 1, 2, 2, 1, 3)]
    measure, quality = stages()
    search(REFERENCE, scoring((measure, quality)), Listed(proposals), archive, Budget(40, 100), [])
    assert widths(archive) == [0, 1, 2, 3]
    assert len(measure.called) == len(quality.called) == 4


def test_a_failure_is_a_trial_and_ends_its_candidate_there(archive: Archive):
    measure, quality = stages(reject(lambda candidate: candidate.architecture["width"] in (2, 3)))
    search(
        REFERENCE,
        scoring((measure, quality)),
        Listed([candidate(width) for width in range(1, 5)]),
        archive,
        Budget(40, 100),
        [],
    )
    failed = archive[candidate(2).uid]
    assert failed.failure == Failure("measure", "no 2")
    assert failed.metrics == {} and failed.seconds.keys() == {"propose", "measure"}
    assert [one.architecture["width"] for one in quality.called] == [0, 1, 4]
    assert widths(archive) == [0, 1, 2, 3, 4]


def test_what_earlier_stages_found_of_a_failed_candidate_is_kept(archive: Archive):
    measure, _ = stages()
    quality = FakeStage("quality", "bits_per_byte", "quality_key", reject(lambda c: c.architecture["width"] == 1))
    search(REFERENCE, scoring((measure, quality)), Listed([candidate(1)]), archive, Budget(9, 100), [])
    trial = archive[candidate(1).uid]
    assert trial.failure == Failure("quality", "no 1")
    assert trial.values == {"latency_s": 2.0}
    assert archive.front() == [archive[REFERENCE.uid]]


def test_a_reference_that_fails_stops_the_search(archive: Archive):
    proposer = Listed([candidate(1)])
    with pytest.raises(UserError, match=rf"^the reference candidate fails.*{REFERENCE.uid} at measure: no 0$"):
        search(REFERENCE, scoring(stages(reject(lambda c: True))), proposer, archive, Budget(9, 100), [])
    assert widths(archive) == [0]
    assert proposer.asked == []


def test_twenty_failures_in_a_row_stop_the_search(archive: Archive):
    proposals = [candidate(width) for width in range(1, 60)]
    refuse = reject(lambda candidate: candidate.architecture["width"] not in (0, 19))
    with pytest.raises(UserError, match=r"^20 candidates in a row failed.* at measure: no 39$"):
        search(REFERENCE, scoring(stages(refuse)), Listed(proposals), archive, Budget(60, 100), [])
    assert widths(archive) == list(range(40)), "all of them are in the archive"


def test_an_error_that_is_no_refusal_stops_the_search_and_keeps_the_trials(archive: Archive):
    def act(candidate: Candidate) -> None:
        if candidate.architecture["width"] == 2:
            raise UserError("the disk is full")

    proposals = [candidate(width) for width in range(1, 5)]
    with pytest.raises(UserError, match="the disk is full"):
        search(REFERENCE, scoring(stages(act)), Listed(proposals), archive, Budget(9, 100), [])
    assert widths(archive) == [0, 1]


def test_candidates_that_differ_in_schedule_alone_share_their_quality(archive: Archive):
    measure, quality = stages()
    proposals = [candidate(1), candidate(1, "unroll"), candidate(2), candidate(0, "unroll")]
    search(REFERENCE, scoring((measure, quality)), Listed(proposals), archive, Budget(9, 100), [])
    assert len(measure.called) == 5 and len(quality.called) == 3
    second = archive[candidate(1, "unroll").uid]
    assert second.reused == ("bits_per_byte",)
    assert second.metrics["bits_per_byte"] == archive[candidate(1).uid].metrics["bits_per_byte"]
    assert second.seconds.keys() == {"propose", "measure"}
    assert archive[candidate(1).uid].reused == ()


def test_nothing_is_shared_with_a_candidate_that_failed_there(archive: Archive):
    measure, _ = stages()
    tried: list[Candidate] = []

    def act(one: Candidate) -> None:
        tried.append(one)
        if one == candidate(1):
            raise Rejected("diverged")

    quality = FakeStage("quality", "bits_per_byte", "quality_key", act)
    search(
        REFERENCE,
        scoring((measure, quality)),
        Listed([candidate(1), candidate(1, "unroll")]),
        archive,
        Budget(9, 9),
        [],
    )
    assert tried == [REFERENCE, candidate(1), candidate(1, "unroll")]


def test_what_was_expected_is_kept_beside_what_was_found(archive: Archive):
    expected = {"latency_s": measured("latency_s", 7.0)}
    search(REFERENCE, scoring(stages(), lambda candidate: expected), Listed([]), archive, Budget(9, 100), [])
    trial = archive[REFERENCE.uid]
    assert trial.predictions["latency_s"].value == 7.0 and trial.values["latency_s"] == 1.0
    assert trial.fingerprint["python"]


def test_trackers_hear_of_everything_after_it_is_stored(archive: Archive):
    notes = Notes()
    search(REFERENCE, scoring(stages()), Listed([candidate(1)]), archive, Budget(9, 100), [notes])
    one = [("measure", 0.0), ("quality", 0.5)]
    assert notes.heard == [("start", 0), *one, ("log", 1), *one, ("log", 2)]


def test_a_search_goes_on_where_the_archive_ends(archive: Archive):
    measure, quality = stages()
    search(REFERENCE, scoring((measure, quality)), Listed([candidate(1)]), archive, Budget(2, 100), [])
    proposer = Listed([candidate(1), candidate(2), candidate(3)])
    search(REFERENCE, scoring((measure, quality)), proposer, archive, Budget(4, 100), [])
    assert widths(archive) == [0, 1, 2, 3]
    assert proposer.told == [trial.uid for trial in archive]
    assert len(measure.called) == 4
    search(REFERENCE, scoring((measure, quality)), proposer, archive, Budget(4, 100), [])
    assert len(measure.called) == 4 and len(archive) == 4


def found(archive: Archive, latencies: Sequence[float]) -> None:
    """Fills the archive with trials of one quality and memory; the first is the reference."""
    for width, latency in enumerate(latencies):
        metrics = {"latency_s": measured("latency_s", latency), "bits_per_byte": measured("bits_per_byte", 1.0)}
        one = candidate(width)
        archive.append(Trial(one, latency_key=one.uid, quality_key=one.quality_axes_key, metrics=metrics))


def test_what_is_confirmed_is_the_reference_and_then_what_would_be_on_the_front(archive: Archive):
    found(archive, [2.0, 1.0, 1.2, 1.5])
    asked: list[Candidate] = []

    def measure(one: Candidate) -> Metrics:
        asked.append(one)
        if one == candidate(2):
            raise Rejected("wrong result: it was a race")
        return {"latency_s": measured("latency_s", 1.4 if one == candidate(1) else 1.9)}

    notes = Notes()
    confirm(measure, archive, 100, [notes])
    assert asked == [REFERENCE, candidate(1), candidate(2)], "the third was slower from the start"
    assert [trial.uid for trial in archive.front()] == [candidate(1).uid]
    assert archive.front()[0].values["latency_s"] == 1.4 and archive.reference["latency_s"] == 1.9
    assert archive[candidate(2).uid].failure == Failure("confirm", "wrong result: it was a race")
    assert [name for name, _ in notes.heard] == ["confirm"] * 3
    confirm(measure, archive, 100, [])
    assert len(asked) == 3, "nothing is confirmed twice"


def test_confirming_ends_with_its_time_and_goes_on_when_resumed(archive: Archive, monkeypatch: pytest.MonkeyPatch):
    found(archive, [2.0, *(1.0 - width / 100 for width in range(1, 10))])
    asked: list[Candidate] = []
    monkeypatch.setattr(time, "monotonic", lambda: 5.0 * len(asked))

    def measure(one: Candidate) -> Metrics:
        asked.append(one)
        return {"latency_s": measured("latency_s", 1.5)}

    confirm(measure, archive, 12.0, [])
    assert len(asked) == 3
    assert archive[asked[2].uid].seconds == {"confirm": 5.0}
    confirm(measure, archive, 100.0, [])
    assert len(asked) == len(set(asked)) == 10
    assert len(archive.front()) == 1


def test_however_short_the_time_not_the_reference_alone_is_confirmed(archive: Archive):
    found(archive, [2.0, 1.0, 1.2])

    def measure(one: Candidate) -> Metrics:
        if one == candidate(1):
            raise Rejected("wrong result: it was a race")
        return {"latency_s": measured("latency_s", 2.0)}

    confirm(measure, archive, 0.0, [])
    assert [trial.uid for trial in archive if trial.confirmed] == [REFERENCE.uid, candidate(1).uid, candidate(2).uid]


def test_nothing_feasible_is_nothing_to_confirm(archive: Archive):
    confirm(lambda one: {}, archive, 100, [])
    assert not archive.front()


def test_of_candidates_that_are_equal_none_is_reported_to_win(archive: Archive):
    rng = random.Random(0)
    found(archive, [1.0, *(rng.lognormvariate(0, 0.06) for _ in range(150))])
    assert archive.front()[0].values["latency_s"] < 0.9
    calls = []

    def measure(one: Candidate) -> Metrics:
        calls.append(one)
        return {"latency_s": measured("latency_s", rng.lognormvariate(0, 0.003))}

    confirm(measure, archive, 100, [])
    assert abs(archive.front()[0].values["latency_s"] / archive.reference["latency_s"] - 1) < 0.015
    assert len(calls) < 100


# Whole searches.


def stored(folder: Path) -> list[tuple[int, str, str]]:
    """Sequence, uid and JSON of every trial in a run's archive."""
    if not (folder / "trials.db").is_file():
        return []
    with sqlite3.connect(f"file:{folder / 'trials.db'}?mode=ro", uri=True) as connection:
        try:
            rows = connection.execute("SELECT sequence, uid, trial FROM trials ORDER BY sequence").fetchall()
        except sqlite3.OperationalError:
            rows = []  # not made yet
    connection.close()
    return rows


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "pareto.json").read_text())


def check_finished(folder: Path, trials: int) -> None:
    """A whole run: its trials, its front, and an artifact for each point of it."""
    rows = stored(folder)
    assert len(rows) == len({uid for _, uid, _ in rows}) == trials
    told = document(folder)
    assert told["trials"]["total"] == trials
    assert told["points"]
    for point in told["points"]:
        assert point["artifact"] == f"artifacts/{point['uid']}"
        assert (folder / point["artifact"] / "manifest.json").is_file()


def test_a_run_keeps_its_contract(finished: Path):
    check_finished(finished, 6)
    names = {path.name for path in finished.iterdir() if not path.name.startswith((".", "trials.db-"))}
    assert names == {"config.yaml", "trials.db", "pareto.json", "report.html", "comparison.json", "artifacts"}
    told = document(finished)
    assert [entry["name"] for entry in told["objectives"]] == ["latency_s", "bits_per_byte"]
    assert all(entry["goal"] == "minimize" and entry["unit"] for entry in told["objectives"])
    assert told["hypervolume"] > 0
    uids = {uid for _, uid, _ in stored(finished)}
    for point in told["points"]:
        assert point["uid"] in uids
        assert point["confirmed"] and point["searched"]["latency_s"]["value"] > 0
        assert Candidate.from_point(point["candidate"]).uid == point["uid"]
        for metric in point["metrics"].values():
            assert metric["source"] == "measured" and metric["unit"]
        for name in ("latency_s", "bits_per_byte"):
            low, high = point["metrics"][name]["interval"]
            assert low <= point["metrics"][name]["value"] <= high
    comparison = told["comparison"]
    assert comparison["interval"][0] <= comparison["speedup"] <= comparison["interval"][1]


def test_every_trial_keeps_its_samples_or_its_failure(finished: Path):
    for _, _, text in stored(finished):
        trial = Trial.from_json(json.loads(text))
        if trial.failure is None:
            assert len(trial.metrics["latency_s"].samples) >= 20
            assert len(trial.metrics["bits_per_byte"].samples) == 8
            assert trial.metrics["numerical_error"].value <= 1
        assert trial.fingerprint["jaxlib"]


def test_trials_of_one_model_share_its_training(finished: Path):
    trials = [Trial.from_json(json.loads(text)) for _, _, text in stored(finished)]
    seen: set[str] = set()
    shared = 0
    for trial in trials:
        if trial.failure is None:
            assert ("bits_per_byte" in trial.reused) == (trial.quality_key in seen)
            assert ("quality" in trial.seconds) == (trial.quality_key not in seen)
            shared += trial.quality_key in seen
            seen.add(trial.quality_key)
    assert shared, "6 trials of a space with 4 models share some"


def test_every_point_of_the_front_generates(finished: Path, capsys: pytest.CaptureFixture[str]):
    for point in document(finished)["points"]:
        folder = finished / point["artifact"]
        assert main(["generate", f"artifact={folder}", "prompt=def main(", "tokens=8"]) == 0
        assert capsys.readouterr().out.startswith("def main(")


def test_report_writes_the_same_again(run_copy: Path):
    before = document(run_copy)
    (run_copy / "pareto.json").unlink()
    (run_copy / "report.html").unlink()
    assert main(["report", f"run={run_copy}"]) == 0
    assert document(run_copy) == before
    assert (run_copy / "report.html").stat().st_size > 10_000


def test_resuming_a_finished_run_changes_nothing(run_copy: Path):
    before, rows = document(run_copy), stored(run_copy)
    times = {path: path.stat().st_mtime_ns for path in (run_copy / "artifacts").rglob("*") if path.is_file()}
    assert main(["resume", f"run={run_copy}"]) == 0
    assert document(run_copy) == before
    assert stored(run_copy) == rows
    assert {path: path.stat().st_mtime_ns for path in (run_copy / "artifacts").rglob("*") if path.is_file()} == times


def test_a_lost_artifact_is_written_again(run_copy: Path):
    lost = run_copy / document(run_copy)["points"][0]["artifact"]
    shutil.rmtree(lost)
    assert main(["resume", f"run={run_copy}"]) == 0
    check_finished(run_copy, 6)


def test_no_constraint_satisfied_shows_the_nearest(inputs: Path, tmp_path: Path):
    arguments = tiny.overrides(inputs, tmp_path, "constraints=['memory_bytes <= 10']", "budget.trials=2")
    code, out, err = tiny.command(*arguments, "trackers=[console]")
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert "no trial satisfies the constraints: memory_bytes <= 10" in last
    assert "nearest" in out + err
    (folder,) = (tmp_path / "llm_decode").iterdir()
    assert stored(folder)[0][1] in out + err
    assert document(folder)["points"] == []


def run_folder(output: Path) -> Path | None:
    return next((output / "llm_decode").iterdir(), None) if (output / "llm_decode").is_dir() else None


def worker_of(process: int) -> list[int]:
    """The processes that `process` started."""
    tasks = Path(f"/proc/{process}/task")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


def interrupt(process: subprocess.Popen[str]) -> str:
    """Interrupt once; what it wrote to stderr until it ended."""
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=60)[1]


def test_an_interrupted_run_says_so_and_ends_as_if_it_had_not_been(finished: Path, inputs: Path, tmp_path: Path):
    process = tiny.start(tiny.overrides(inputs, tmp_path))
    try:
        tiny.wait_until(lambda: (f := run_folder(tmp_path)) and stored(f), 120, "there is a first trial")
        workers = worker_of(process.pid)
        err = interrupt(process)
    finally:
        tiny.end(process)
    assert process.returncode == 130
    assert "cosearch: stopped; a search continues with: python -m cosearch resume run=" in err
    assert "Traceback" not in err
    tiny.wait_until(lambda: not any(map(tiny.is_running, workers)), 30, "its workers are gone")
    folder = run_folder(tmp_path)
    assert folder is not None
    rows = stored(folder)
    code, _, err = tiny.command("resume", f"run={folder}")
    assert code == 0, err
    assert stored(folder)[: len(rows)] == rows
    check_finished(folder, 6)
    # A seed gives the same candidates in the same order, interrupted or not.
    assert [uid for _, uid, _ in stored(folder)] == [uid for _, uid, _ in stored(finished)]


def kill_after(process: subprocess.Popen[str], output: Path, seconds: float) -> dict[str, str]:
    """Kill a run so many seconds after it has a folder; the trials that were acknowledged until then, by uid."""
    acknowledged: dict[str, str] = {}
    try:
        tiny.wait_until(lambda: run_folder(output) or process.poll() is not None, 120, "there is a run folder")
        folder = run_folder(output)
        assert folder is not None, process.communicate()[1]
        until = time.monotonic() + seconds
        while time.monotonic() < until and process.poll() is None:
            acknowledged |= {uid: text for _, uid, text in stored(folder)}
            time.sleep(0.02)
        workers = worker_of(process.pid) if process.poll() is None else []
        process.kill()  # the process alone: its workers have to notice
        process.wait(10)
    finally:
        tiny.end(process)
    tiny.wait_until(lambda: not any(map(tiny.is_running, workers)), 5, "its workers are gone")
    now = {uid: text for _, uid, text in stored(folder)}
    assert acknowledged.items() <= now.items(), "a trial that was acknowledged is lost or changed"
    return acknowledged


def kill_and_resume(inputs: Path, output: Path, kills: int, trials: int, seed: int) -> None:
    """Kill a run at random moments; what was acknowledged before each must be there at the end, and once."""
    rng = random.Random(seed)
    acknowledged: dict[str, str] = {}
    arguments: Sequence[str] = tiny.overrides(inputs, output, f"budget.trials={trials}")
    for _ in range(kills):
        acknowledged |= kill_after(tiny.start(arguments), output, rng.uniform(0.1, 8.0))
        arguments = ["resume", f"run={run_folder(output)}"]
    code, _, err = tiny.command(*arguments)
    assert code == 0, err
    folder = run_folder(output)
    assert folder is not None
    assert acknowledged.items() <= {uid: text for _, uid, text in stored(folder)}.items()
    check_finished(folder, trials)
    uids = {uid for _, uid, _ in stored(folder)}
    left = [path.name for path in (folder / "artifacts").iterdir() if path.name not in uids]
    assert all(name.startswith(".") for name in left), "what a kill left half-written does not look like an artifact"


def test_no_kill_loses_or_repeats_a_trial(inputs: Path, tmp_path: Path):
    kill_and_resume(inputs, tmp_path, kills=3, trials=6, seed=0)


@pytest.mark.fault
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_kills_lose_and_repeat_no_trial(inputs: Path, tmp_path: Path, seed: int):
    kill_and_resume(inputs, tmp_path, kills=8, trials=10, seed=seed)


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("cosearch", run_name="__main__", alter_sys=True)
"""


def without_space(limit: int, *arguments: str) -> tuple[int, str]:
    """Exit code and errors of a command in which no file, its workers' neither, can grow beyond `limit` bytes."""
    told = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *arguments],
        env={**os.environ, "PYTHONPATH": str(tiny.ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return told.returncode, told.stderr


def check_no_half(folder: Path) -> None:
    """Whatever is there is there whole."""
    if (folder / "pareto.json").exists():
        document(folder)
    if (folder / "artifacts").exists():
        for path in (folder / "artifacts").iterdir():
            assert path.suffix == ".failed" or not path.is_dir() or (path / "manifest.json").is_file(), path
        assert not [path for path in (folder / "artifacts").iterdir() if path.name.startswith(".")]
    assert not [path for path in folder.iterdir() if path.name.startswith(".") and path.name != ".lock"]


@pytest.mark.parametrize(
    ("limit", "trials"),
    [
        pytest.param(45_000, 6, id="artifact"),
        pytest.param(45_000, 8, id="trial", marks=pytest.mark.fault),
        pytest.param(200, 8, id="anything", marks=pytest.mark.fault),
    ],
)
def test_a_file_that_cannot_grow_ends_the_run_with_a_message(run_copy: Path, limit: int, trials: int):
    for path in (run_copy / "artifacts").iterdir():
        shutil.rmtree(path)
    (run_copy / "pareto.json").unlink()
    config = run_copy / "config.yaml"
    config.write_text(config.read_text().replace("trials: 6", f"trials: {trials}"))
    rows = stored(run_copy)
    code, err = without_space(limit, "resume", f"run={run_copy}")
    assert code == 2, err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("cosearch: ")
    assert stored(run_copy)[: len(rows)] == rows
    check_no_half(run_copy)
    code, _, err = tiny.command("resume", f"run={run_copy}")
    assert code == 0, err
    check_finished(run_copy, trials)


@pytest.mark.fault
def test_a_full_disk_ends_the_run_with_a_message(run_copy: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
    try:
        shutil.rmtree(run_copy / "artifacts")
        folder = Path(shutil.copytree(run_copy, disk / "run"))
        (folder / "pareto.json").unlink()
        (disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(disk).free - 20_000))
        rows = stored(folder)
        code, out, err = tiny.command("resume", f"run={folder}")
        assert code == 2, out + err
        assert "full" in err.strip().splitlines()[-1]
        check_no_half(folder)
        assert stored(folder) == rows
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_refused_at_the_start(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    assert main(tiny.overrides(inputs, tmp_path / "runs")) == 2
    assert "the disk has 1 MB free; a run needs 300 MB" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("*"))
