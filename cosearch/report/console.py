"""The tracker `console`: a live display on a terminal, one line for each trial where the output is none."""

import atexit
import io
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import rich.console
from rich import box
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cosearch.core.archive import Archive
from cosearch.core.trial import Trial
from cosearch.report import TRACKERS, Outcome, Run, text
from cosearch.report.pace import Pace
from cosearch.report.pareto import effort, failed, knee

_REFRESH_S = 0.5
_PLAIN_WIDTH = 160
_MOST_ROWS = 30
_NEAREST = 5


@dataclass(frozen=True)
class _Standing:
    """What the live display says of the archive."""

    done: int = 0
    failed: int = 0
    front: int = 0
    hypervolume: float = 0.0
    best: str = "none yet satisfies the constraints"
    spent_s: float = 0.0
    at_s: float = 0.0


class _Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        # A reader that goes away (`| head`) must not end the search, as rich's own handler would.
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@TRACKERS.register("console")
class ConsoleTracker:
    """Tells a person at a terminal, or a log, how the search goes and what it found."""

    def __init__(self, run: Run) -> None:
        self._run = run
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that cannot show 'µ' gets '?', not an exception.
            sys.stdout.reconfigure(errors="replace")
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        # Without markup and emoji codes every text is shown as it is, also one that reads '[bold]'.
        self._console = _Console(
            force_terminal=terminal,
            width=None if terminal else _PLAIN_WIDTH,
            markup=False,
            emoji=False,
            highlight=False,
        )
        self._terminal = terminal
        self._pace = Pace(_REFRESH_S)
        self._standing = _Standing(at_s=time.monotonic())
        self._stage = ("starting", "", 0.0)
        # The display is gone when the search ends, the summary takes its place.
        self._live = Live(get_renderable=self._picture, console=self._console, refresh_per_second=4, transient=True)

    def start(self, archive: Archive) -> None:
        problem, space, budget = self._run.problem, self._run.space, self._run.budget
        goals = ", ".join(map(str, (*problem.objectives, *problem.constraints)))
        self._say(
            f"{text.plain(self._run.experiment)}: {text.plain(space.name)}, {space.size:,} points, "
            f"on {text.plain(problem.target.name)} for {text.plain(problem.workload.name)}: {text.plain(goals)}"
        )
        kept = f"; {len(archive)} trials are there already" if len(archive) else ""
        self._say(
            f"up to {budget.trials} trials or {text.duration(budget.seconds)}, into {_path(self._run.folder)}{kept}"
        )
        if not problem.target.attached:
            self._say(
                f"{text.plain(problem.target.name)} is not attached: models are compiled for it, their mathematics is "
                "verified on this machine, and latencies are predicted, never confirmed"
            )
        self._look(archive)
        if self._terminal:
            # `finish` is not called where the search is interrupted; the terminal must get its cursor back even so.
            atexit.register(self._live.stop)
            self._live.start()

    def progress(self, stage: str, detail: str, fraction: float) -> None:
        self._stage = (text.plain(stage, 30), text.plain(detail, 80), min(1.0, max(0.0, fraction)))

    def log(self, trial: Trial, archive: Archive) -> None:
        if self._terminal:
            self._pace.run(lambda: self._look(archive))
            return
        problem, reference = self._run.problem, self._run.space.reference
        parts = (
            f"{len(archive)}/{self._run.budget.trials}",
            trial.uid,
            text.choices(trial.candidate, reference),
            text.objectives(problem, trial.metrics),
            text.verdict(problem, trial, archive.reference),
        )
        self._say("  ".join(part for part in parts if part))

    def finish(self, archive: Archive, outcome: Outcome) -> None:
        self._live.stop()
        atexit.unregister(self._live.stop)
        front = archive.front()
        self._say("")
        self._say(f"{len(archive)} trials, {failed(archive)} failed, hypervolume {archive.hypervolume():.3f}")
        done = effort(archive)
        words = f"{done['considered']:,} candidates considered"
        self._say(f"{words}, {done['compiled']:,} compiled, {done['measured']:,} measured")
        if front:
            self._say_front(archive, front, outcome)
        else:
            self._say_nearest(archive)
        if (report := self._run.folder / "report.html").exists():
            self._say(f"report    {_path(report)}")

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)

    def _say_front(self, archive: Archive, front: list[Trial], outcome: Outcome) -> None:
        best = knee(archive, front)
        metrics = [objective.metric for objective in self._run.problem.objectives]
        table = Table(box=box.SIMPLE, title=f"The front: {len(front)} points", title_justify="left")
        table.add_column("")
        table.add_column("uid", no_wrap=True)
        for metric in metrics:
            table.add_column(text.label(metric), justify="right", no_wrap=True)
        table.add_column("differs from the reference in", ratio=1)
        for trial in front[:_MOST_ROWS]:
            table.add_row(
                "knee" if trial is best else "",
                trial.uid,
                *(text.told(metric, trial.metrics[metric]) for metric in metrics),
                text.choices(trial.candidate, self._run.space.reference),
                style="bold" if trial is best else None,
            )
        self._console.print(table)
        if len(front) > _MOST_ROWS:
            self._say(f"and {len(front) - _MOST_ROWS} more in the report")
        if outcome.comparison:
            self._say(f"{outcome.comparison.uid}: {text.speedup(outcome.comparison)}")
        elif outcome.why_no_comparison:
            self._say(f"not compared with the plain way: {outcome.why_no_comparison}")
        if best and best.uid in outcome.artifacts:
            folder = shlex.quote(_path(outcome.artifacts[best.uid]))
            self._say(f'try it    python -m cosearch generate artifact={folder} prompt="def main(" tokens=64')

    def _say_nearest(self, archive: Archive) -> None:
        self._say("No trial satisfies the constraints.")
        near = archive.nearest(_NEAREST)
        if not near:
            self._say("None came as far as having every objective; the report lists why.")
            return
        table = Table(box=box.SIMPLE, title=f"The {len(near)} nearest", title_justify="left")
        table.add_column("uid", no_wrap=True)
        table.add_column("objectives", no_wrap=True)
        table.add_column("breaks")
        table.add_column("differs from the reference in", ratio=1)
        for trial in near:
            table.add_row(
                trial.uid,
                text.objectives(self._run.problem, trial.metrics),
                text.verdict(self._run.problem, trial, archive.reference).removeprefix("breaks "),
                text.choices(trial.candidate, self._run.space.reference),
            )
        self._console.print(table)

    def _look(self, archive: Archive) -> None:
        front = archive.front()
        losses = archive.losses(front)
        leaders = [front[int(row)].metrics for row in losses.argmin(axis=0)] if front else []
        best = "   ".join(
            f"{text.label(objective.metric)} {text.told(objective.metric, metrics[objective.metric])}"
            for objective, metrics in zip(self._run.problem.objectives, leaders, strict=False)
        )
        self._standing = _Standing(
            done=len(archive),
            failed=failed(archive),
            front=len(front),
            hypervolume=archive.hypervolume(),
            best=best or _Standing.best,
            spent_s=archive.seconds,
            at_s=time.monotonic(),
        )

    def _left_s(self) -> float:
        now, budget = self._standing, self._run.budget
        by_time = budget.seconds - now.spent_s - (time.monotonic() - now.at_s)
        by_trials = (budget.trials - now.done) * now.spent_s / now.done if now.done else by_time
        return min(by_time, by_trials)

    def _picture(self) -> rich.console.Group:
        """Drawn by the display's own thread, from values that are replaced and never changed."""
        now, budget, (stage, detail, fraction) = self._standing, self._run.budget, self._stage
        bars = Table.grid(padding=(0, 2))
        bars.add_row(Text("trials", "bold"), _bar(now.done / max(1, budget.trials)), f"{now.done}/{budget.trials}")
        bars.add_row(Text(stage, "bold"), _bar(fraction), detail)
        left = text.duration(self._left_s())
        return rich.console.Group(
            bars,
            f"{now.front} points on the front, hypervolume {now.hypervolume:.3f}, {now.failed} failed, {left} left",
            f"best: {now.best}",
        )


def _path(path: Path) -> str:
    return text.plain(path, limit=4096)


def _bar(fraction: float) -> ProgressBar:
    return ProgressBar(total=1.0, completed=min(1.0, fraction), width=30)
