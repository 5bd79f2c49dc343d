import io
import os
import pty
import subprocess
import sys
import threading

import pytest

from cosearch.report import Outcome
from cosearch.report.console import ConsoleTracker
from tests.report.samples import FAST, KNEE, make_run


def play(run, archive, outcome) -> None:
    """A whole search as the tracker sees it; `archive` has all its trials already."""
    tracker = ConsoleTracker(run)
    tracker.start(archive)
    for trial in archive:
        tracker.progress("measure", "decode \x1b[31mbatch 1", 0.5)
        tracker.log(trial, archive)
    tracker.finish(archive, outcome)


def test_without_a_terminal_every_trial_is_one_plain_line(run, archive, outcome, capsys):
    play(run, archive, outcome)
    out = capsys.readouterr().out
    lines = out.splitlines()
    for trial in archive:
        [line] = [line for line in lines if line.startswith(f"7/12  {trial.uid}")]
        assert ("rejected at verify" in line) == (trial.failure is not None)
    assert any(line.endswith("latency 400 µs, bits/byte 2.950  ok") for line in lines)
    assert any(line.endswith("breaks bits_per_byte <= 1.1 * reference by 9.1 %") for line in lines)
    assert out.replace("\n", "").isprintable()
    assert "[bold red]x[/]" in out
    assert ":smile:" in out


def test_the_summary_has_the_front_the_speedup_and_what_to_do_next(run, archive, outcome, capsys):
    (run.folder / "report.html").touch()
    play(run, archive, outcome)
    out = capsys.readouterr().out
    assert "7 trials, 1 failed, hypervolume" in out
    assert "The front: 3 points" in out
    [row] = [line for line in out.splitlines() if line.strip().startswith("knee")]
    assert row.split()[:4] == ["knee", KNEE.uid, "400", "µs"]
    assert "1.9x [1.8, 2] faster than the same architecture compiled the plain way, measured side by side" in out
    folder = outcome.artifacts[KNEE.uid]
    assert f'python -m cosearch generate artifact={folder} prompt="def main(" tokens=64' in out
    assert str(run.folder / "report.html") in out


def test_that_there_is_no_comparison_is_told(run, archive, outcome, capsys):
    play(run, archive, Outcome(outcome.artifacts, None, "compare: took longer than 180 s"))
    assert "not compared with the plain way: compare: took longer than 180 s" in capsys.readouterr().out


def test_where_nothing_is_feasible_the_nearest_are_shown(run, fill, capsys):
    strict = make_run(run.folder, bound="0.5 * reference")
    play(strict, fill(strict), Outcome())
    summary = capsys.readouterr().out.partition("No trial satisfies the constraints.")[2]
    assert "The 5 nearest" in summary
    assert "bits_per_byte <= 0.5 *" in summary
    assert "94.0 %" in summary
    assert FAST.uid in summary


def test_where_nothing_is_complete_it_says_so(run, fill, capsys):
    play(run, fill(run, ()), Outcome())
    assert "None came as far" in capsys.readouterr().out


def test_a_narrow_character_set_is_no_failure(run, archive, outcome, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    play(run, archive, outcome)
    stream.flush()
    assert b"latency 400 ?s" in stream.buffer.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


PLAY = """
import sys, time
from pathlib import Path
from cosearch.core.archive import Archive
from cosearch.report import Outcome
from cosearch.report.console import ConsoleTracker
from tests.report.samples import TRIALS, make_run
run = make_run(Path(sys.argv[1]))
archive = Archive(run.folder / "trials.db", run.problem, run.space.reference.uid)
tracker = ConsoleTracker(run)
tracker.start(archive)
for trial in TRIALS:
    archive.append(trial)
    tracker.progress("measure", "decode [bold]\\x1b[31mbatch", 0.5)
    tracker.log(trial, archive)
    time.sleep(0.3)
if sys.argv[2] == "interrupted":
    raise KeyboardInterrupt
tracker.finish(archive, Outcome())
"""


@pytest.mark.parametrize("ending", ["finished", "interrupted"])
def test_a_terminal_gets_a_live_display_and_its_cursor_back(run, ending):
    ours, theirs = pty.openpty()
    seen = bytearray()

    def read() -> None:
        try:
            while piece := os.read(ours, 4096):
                seen.extend(piece)
        except OSError:  # the other end is closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    subprocess.run(
        [sys.executable, "-c", PLAY, str(run.folder), ending],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment,
        check=False,
        timeout=60,
    )
    os.close(theirs)
    reader.join(10)
    os.close(ours)
    out = seen.decode()
    assert "measure" in out
    assert "points on the front" in out
    assert "\x1b[31mbatch" not in out
    assert "decode [bold][31mbatch" in out
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l")  # the cursor is shown after it was hidden
    assert ("The front: 3 points" in out) == (ending == "finished")


def test_a_reader_that_goes_away_stops_nothing(run):
    done = subprocess.run(
        [
            "bash",
            "-c",
            'set -o pipefail; "$0" "$@" | head -n 1',
            sys.executable,
            "-c",
            PLAY,
            str(run.folder),
            "finished",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
