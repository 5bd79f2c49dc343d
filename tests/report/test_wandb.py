import json
import os
import time
from pathlib import Path

import pytest

from cosearch.report.wandb import WandbTracker, run_id
from tests.report.samples import FAST, TRIALS, make_run


@pytest.fixture(autouse=True)
def nobody_is_logged_in(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no.netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


def play(tracker: WandbTracker, archive, outcome) -> float:
    """A whole search as the tracker sees it; the seconds that it took."""
    started = time.monotonic()
    tracker.start(archive)
    for trial in archive:
        tracker.progress("measure", "", 0.5)
        tracker.log(trial, archive)
    tracker.finish(archive, outcome)
    return time.monotonic() - started


def fake_wandb(folder: Path, monkeypatch, code: str) -> None:
    package = folder / "fake" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), *([before] if before else [])]))


def test_an_offline_run_has_the_table_the_scatter_and_the_front(run, archive, outcome, capfd):
    play(WandbTracker(run, limit_s=60), archive, outcome)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    [folder] = (run.folder / "wandb").glob("offline-run-*")
    assert folder.name.endswith(run_id(run))
    tables = [json.loads(path.read_text()) for path in folder.glob("files/media/table/**/*.table.json")]
    trials = next(table for table in tables if "verdict" in table["columns"] and len(table["data"]) == len(TRIALS))
    row = dict(zip(trials["columns"], next(row for row in trials["data"] if row[0] == FAST.uid), strict=True))
    assert row["latency_s"] == 312e-6
    assert row["on_front"] is True
    assert row["verdict"] == "ok"
    assert any(table["columns"] == ["uid", "latency_s", "bits_per_byte"] for table in tables)
    assert list(folder.glob("files/media/plotly/**/front*.plotly.json"))


def test_a_resumed_run_keeps_its_name_and_another_folder_has_another(run, tmp_path):
    assert run_id(run) == run_id(make_run(run.folder))
    (tmp_path / "x" / run.folder.name).mkdir(parents=True)
    assert run_id(make_run(tmp_path / "x" / run.folder.name)) != run_id(run)
    assert run_id(make_run(run.folder, experiment="a/b:c?")).startswith("a-b-c-")


NOTE_PID = "import os, pathlib, time\npathlib.Path(os.environ['PID_FILE']).write_text(str(os.getpid()))\n"
HANGS = (
    "def init(**_): time.sleep(3600)\nSettings = dict",
    "time.sleep(3600)",
    "class Run:\n def log(self, _): time.sleep(3600)\ndef init(**_): return Run()\nSettings = dict",
)
FAILURES = (
    ("raise ImportError('W&B is \\x1b[31mnot here')", "ImportError: W&B is [31mnot here"),
    ("os._exit(7)", "ended with 7"),
)


@pytest.mark.parametrize("code", HANGS)
def test_a_wandb_that_hangs_is_ended(run, archive, outcome, monkeypatch, capsys, code):
    fake_wandb(run.folder, monkeypatch, NOTE_PID + code)
    monkeypatch.setenv("PID_FILE", str(run.folder / "pid"))
    assert play(WandbTracker(run, limit_s=4), archive, outcome) < 8
    [line] = capsys.readouterr().err.splitlines()
    assert line == "W&B did not record all of this run: it took longer than its limit"
    with pytest.raises(ProcessLookupError):
        os.kill(int((run.folder / "pid").read_text()), 0)


@pytest.mark.parametrize(("code", "words"), FAILURES)
def test_a_wandb_that_fails_costs_one_line(run, archive, outcome, monkeypatch, capsys, code, words):
    fake_wandb(run.folder, monkeypatch, "import os\n" + code)
    play(WandbTracker(run, limit_s=30), archive, outcome)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("W&B did not record all of this run: ")
    assert words in line


def test_a_wandb_that_hangs_does_not_slow_the_search(run, archive, outcome, monkeypatch, capsys):
    fake_wandb(run.folder, monkeypatch, "import time\ntime.sleep(3600)")
    tracker = WandbTracker(run, limit_s=0.5)
    tracker.start(archive)
    tracker.log(FAST, archive)  # draws a picture, which is done only every so often
    started = time.monotonic()
    for _ in range(3000):
        tracker.log(FAST, archive)
    assert time.monotonic() - started < 2
    tracker.finish(archive, outcome)
    assert "longer than its limit" in capsys.readouterr().err
