"""The tracker `wandb`: the run at Weights & Biases, offline where nobody is logged in.

Whatever W&B does, the search goes on: all of W&B runs in a process of its own (`wandb_process.py`), is told things
through a bounded queue that drops what does not fit, and is killed where it overruns its limit.
"""

import atexit
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from typing import IO, Any

from cosearch.core.archive import Archive
from cosearch.core.candidate import content_hash
from cosearch.core.trial import Trial
from cosearch.report import TRACKERS, Outcome, Run, figures, text
from cosearch.report.pace import Pace
from cosearch.report.pareto import failed

_REFRESH_S = 15.0
_QUEUE = 1000
_INTERRUPTED_S = 3.0
_ENVIRONMENT = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_ERROR_REPORTING": "false"}


class WandbTracker:
    """Sends trials as rows, and the table of all trials and the front now and then; `limit_s` bounds `finish`."""

    def __init__(self, run: Run, limit_s: float = 30.0) -> None:
        self._run = run
        self._limit_s = limit_s
        self._pace = Pace(_REFRESH_S)
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._trouble = ""
        self._last_words = ""
        self._dropped = 0

    def start(self, archive: Archive) -> None:
        run = self._run
        self._offer(
            {
                "start": {
                    "id": run_id(run),
                    "name": f"{run.experiment}/{run.folder.name}",
                    "folder": str(run.folder),
                    "config": {
                        "experiment": run.experiment,
                        "space": run.space.name,
                        "problem": run.problem.to_json(),
                        "budget": {"trials": run.budget.trials, "seconds": run.budget.seconds},
                    },
                }
            }
        )
        self._thread.start()
        # `finish` is not called where the search is interrupted, and no process may stay behind.
        atexit.register(self._interrupted)

    def progress(self, stage: str, detail: str, fraction: float) -> None:
        pass

    def log(self, trial: Trial, archive: Archive) -> None:
        row = {
            # What was expected of a trial before gives way to what was predicted of it once it was compiled.
            **{f"predicted/{name}": metric.value for name, metric in trial.predictions.items()},
            **{_column(name, metric.source): metric.value for name, metric in trial.metrics.items()},
            "trial": len(archive),
            "failed": int(trial.failure is not None),
            "seconds": sum(trial.seconds.values()),
        }
        keeps_up = self._queue.empty()
        self._offer({"row": row})
        if keeps_up:  # a process that lags behind is not given more to draw
            self._pace.run(lambda: self._offer({"picture": self._picture(archive, Outcome())}))

    def finish(self, archive: Archive, outcome: Outcome) -> None:
        deadline = time.monotonic() + self._limit_s
        self._offer({"picture": self._picture(archive, outcome)}, deadline)
        self._end(deadline)
        atexit.unregister(self._interrupted)
        if not self._trouble and self._dropped:
            self._trouble = f"it was too slow for {self._dropped} messages"
        if self._trouble:
            print(f"W&B did not record all of this run: {text.plain(self._trouble)}", file=sys.stderr)

    def _interrupted(self) -> None:
        self._end(time.monotonic() + _INTERRUPTED_S)

    def _end(self, deadline: float) -> None:
        self._offer(None, deadline)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            if self._process and self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._thread.join(1.0)
            self._trouble = "it took longer than its limit"

    def _picture(self, archive: Archive, outcome: Outcome) -> dict[str, Any]:
        """All trials as a table, and the front as a figure."""
        metrics = list(dict.fromkeys((name, one.source) for trial in archive for name, one in trial.metrics.items()))
        knobs = list(dict.fromkeys(knob for trial in archive for knob in trial.candidate.point))
        front = {trial.uid for trial in archive.front()}
        rows = [
            [
                trial.uid,
                *(_value_from(trial, name, source) for name, source in metrics),
                *(text.worded(trial.candidate.point.get(knob)) for knob in knobs),
                trial.uid in front,
                text.verdict(self._run.problem, trial, archive.reference),
            ]
            for trial in archive
        ]
        summary: dict[str, Any] = {
            "hypervolume": archive.hypervolume(),
            "front_size": len(front),
            "trials": len(archive),
            "failed_trials": failed(archive),
        }
        if outcome.comparison:
            low, high = outcome.comparison.interval
            summary |= {"speedup": outcome.comparison.speedup, "speedup_low": low, "speedup_high": high}
        return {
            "columns": [
                "uid",
                *(_column(*metric) for metric in metrics),
                *map(text.plain, knobs),
                "on_front",
                "verdict",
            ],
            "rows": rows,
            "plane": [
                next((_column(*metric) for metric in metrics if metric[0] == objective.metric), objective.metric)
                for objective in self._run.problem.objectives[:2]
            ],
            "figure": figures.front(self._run, archive, outcome).to_json(),
            "summary": summary,
        }

    def _offer(self, message: dict[str, Any] | None, deadline: float | None = None) -> None:
        try:
            if deadline is None:
                self._queue.put_nowait(message)
            elif self._thread.is_alive():
                self._queue.put(message, timeout=max(0.0, deadline - time.monotonic()))
        except queue.Full:
            self._dropped += 1

    def _feed(self) -> None:
        """The thread that alone waits for W&B's process."""
        try:
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", "cosearch.report.wandb_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, **_ENVIRONMENT},
                start_new_session=True,
            )
        except OSError as error:
            self._trouble = str(error)
            return
        assert process.stdin is not None and process.stderr is not None
        listener = threading.Thread(target=self._listen, args=(process.stderr,), daemon=True)
        listener.start()
        try:
            with process.stdin:
                while (message := self._queue.get()) is not None:
                    process.stdin.write(json.dumps(message).encode() + b"\n")
                    process.stdin.flush()
        except BrokenPipeError:
            pass  # the process is gone; how it ended says why
        code = process.wait()
        listener.join(1.0)
        if code:
            self._trouble = self._last_words or f"its process ended with {code}"

    def _listen(self, stream: IO[bytes]) -> None:
        with stream:
            while piece := stream.readline(2000):
                self._last_words = piece.decode(errors="replace").strip() or self._last_words


# Not as a decorator, after which a type checker would no longer know of `limit_s`.
TRACKERS.register("wandb")(WandbTracker)


def _column(name: str, source: str) -> str:
    """A metric's name at W&B, where what is predicted does not go by the name of what is measured."""
    return name if source == "measured" else f"{source}/{name}"


def _value_from(trial: Trial, name: str, source: str) -> float | None:
    metric = trial.metrics.get(name)
    return metric.value if metric and metric.source == source else None


def run_id(run: Run) -> str:
    """W&B's name of a run: the same when it is resumed, another for a folder of equal name elsewhere."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{run.experiment}-{run.folder.name}")[:80]
    return f"{readable}-{content_hash(str(run.folder.resolve()))[:8]}"
