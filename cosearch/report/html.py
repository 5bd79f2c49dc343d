"""The tracker `html`: `report.html`, one file that needs no network, refreshed while the search goes on."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from string import Template
from urllib.parse import quote

import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from cosearch.core.archive import Archive
from cosearch.core.files import write_text
from cosearch.core.trial import Trial
from cosearch.report import TRACKERS, Outcome, Run, figures, text
from cosearch.report.pace import Pace
from cosearch.report.pareto import PREDICTED, document, knee

_REFRESH_S = 20.0
_MOST_REASONS = 40


@TRACKERS.register("html")
class HtmlTracker:
    """Keeps the run's report up to date."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pace = Pace(_REFRESH_S)

    def start(self, archive: Archive) -> None:
        pass

    def progress(self, stage: str, detail: str, fraction: float) -> None:
        pass

    def log(self, trial: Trial, archive: Archive) -> None:
        self._pace.run(lambda: self._write(archive, Outcome(), "The search is still running."))

    def finish(self, archive: Archive, outcome: Outcome) -> None:
        self._write(archive, outcome, "The search has ended.")

    def _write(self, archive: Archive, outcome: Outcome, state: str) -> None:
        path = self._run.folder / "report.html"
        try:
            write_text(path, page(self._run, archive, outcome, state))
        except OSError as error:
            # A full disk costs the report, not the search; `report` writes it anew.
            print(f"{path}: could not be written: {error.strerror}", file=sys.stderr)


def page(run: Run, archive: Archive, outcome: Outcome, state: str = "") -> str:
    """The whole report as one HTML document."""
    data = document(run, archive, outcome)
    best = archive.front()
    predictions = [(name, figures.prediction(run, archive, name)) for name in PREDICTED]
    charts = [
        _section(
            "Hypervolume",
            _draw("hypervolume", figures.hypervolume(archive)),
            "Of the front so far, in losses relative to the reference; more is better.",
        )
    ]
    for name, figure in predictions:
        if figure and (error := data["prediction_error"][name]):
            inside = f", {error['coverage']:.0%} inside the 90 % interval" if error["coverage"] is not None else ""
            note = f"{error['count']} trials, mean error {error['mape']:.1%}{inside}."
            charts.append(
                _section(f"Predicted and measured {text.label(name)}", _draw(f"predicted-{name}", figure), note)
            )
    return _PAGE.substitute(
        title=escape(text.plain(run.experiment)),
        state=escape(f"{state} Written {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}.".strip()),
        searched=_searched(run),
        headline=_headline(data, outcome),
        plotly=get_plotlyjs(),
        front=_draw("front", figures.front(run, archive, outcome)),
        charts="".join(charts),
        points=_points(run, archive, best, outcome),
        failures=_failures(archive),
        environment=_environment(archive),
    )


def _draw(name: str, figure: go.Figure) -> str:
    settings = {"displaylogo": False, "responsive": True}
    return plotly.io.to_html(figure, full_html=False, include_plotlyjs=False, div_id=name, config=settings)


def _searched(run: Run) -> str:
    problem = run.problem
    points = "; ".join(
        f"{point.phase} of batch {point.batch} at context {point.context}"
        + (f" (weight {point.weight:g})" if len(problem.workload.points) > 1 else "")
        for point in problem.workload.points
    )
    words = (
        f"The space <b>{_safe(run.space.name)}</b> of {run.space.size:,} points was searched for "
        f"<b>{_safe(problem.target.name)}</b> ({_safe(problem.target.platform)}) serving "
        f"<b>{_safe(problem.workload.name)}</b>: {_safe(points)}. "
        f"Objectives: <b>{_safe(', '.join(map(str, problem.objectives)))}</b>"
    )
    if problem.constraints:
        words += f", under <b>{_safe(' and '.join(map(str, problem.constraints)))}</b>"
    if not problem.target.attached:
        words += (
            f". <b>No {_safe(problem.target.name)} was attached: latencies are predicted, nothing was run on it</b>"
        )
    return f"{words}. Budget: {run.budget.trials:,} trials or {text.duration(run.budget.seconds)}."


def _headline(data: dict, outcome: Outcome) -> str:
    figures_shown = [
        (f"{data['trials']['total']:,}", "trials"),
        (f"{data['trials']['failed']:,}", "failed"),
        (f"{data['trials']['considered']:,}", "candidates considered"),
        (f"{data['trials']['compiled']:,}", "compiled"),
        (f"{data['trials']['measured']:,}", "measured"),
        (f"{len(data['points']):,}", "points on the front"),
        (f"{data['hypervolume']:.3f}", "hypervolume"),
    ]
    if outcome.comparison:
        low, high = outcome.comparison.interval
        figures_shown.append(
            (f"{outcome.comparison.speedup:.3g}×", f"the plain speed, measured; {low:.3g} to {high:.3g}")
        )
    cards = "".join(f"<div><b>{value}</b><span>{escape(name)}</span></div>" for value, name in figures_shown)
    claim = (
        f"<p>{escape(outcome.comparison.uid)}: {escape(text.speedup(outcome.comparison))}: "
        f"{text.figure('latency_s', outcome.comparison.latency_s)} against "
        f"{text.figure('latency_s', outcome.comparison.plain_latency_s)} per token.</p>"
        if outcome.comparison
        else ""
    )
    return f'<div class="cards">{cards}</div>{claim}'


def _points(run: Run, archive: Archive, best: Sequence[Trial], outcome: Outcome) -> str:
    if not best:
        near = archive.nearest(5)
        rows = [
            (
                escape(trial.uid),
                _safe(text.objectives(run.problem, trial.metrics)),
                _safe(text.verdict(run.problem, trial, archive.reference)),
                _safe(text.choices(trial.candidate, run.space.reference)),
            )
            for trial in near
        ]
        return "<p>No trial satisfies the constraints. The nearest are:</p>" + _table(
            ("uid", "objectives", "verdict", "choices"), rows
        )
    chosen = knee(archive, best)
    metrics = list(dict.fromkeys([o.metric for o in run.problem.objectives] + [m for t in best for m in t.metrics]))
    knobs = text.names(text.varying(best))
    head = ("", "uid", *(escape(text.label(metric)) for metric in metrics), *map(escape, knobs.values()))
    rows = [
        (
            "knee" if trial is chosen else "",
            _link(run, trial, outcome),
            *(_metric(trial, metric) for metric in metrics),
            *(escape(text.worded(trial.candidate.point.get(knob))) for knob in knobs),
        )
        for trial in best
    ]
    return _table(head, rows)


def _metric(trial: Trial, name: str) -> str:
    if name not in trial.metrics:
        return "–"
    metric = trial.metrics[name]
    between = f"{' to '.join(text.figure(name, end) for end in metric.interval)}, " if metric.interval else ""
    mark = "" if metric.source == "measured" else "<i> predicted</i>"
    mark += "<i> on a busy machine</i>" if metric.contended else ""
    return f'<span title="{between}{metric.source}">{text.figure(name, metric.value)}</span>{mark}'


def _link(run: Run, trial: Trial, outcome: Outcome) -> str:
    folder = outcome.artifacts.get(trial.uid)
    if folder is None:
        return f"<code>{trial.uid}</code>"
    return f'<a href="{quote(os.path.relpath(folder, run.folder))}/"><code>{trial.uid}</code></a>'


def _failures(archive: Archive) -> str:
    counts = Counter((t.failure.stage, text.plain(t.failure.reason)) for t in archive if t.failure)
    if not counts:
        return "<p>None.</p>"
    rows = [(_safe(stage), str(count), escape(why)) for (stage, why), count in counts.most_common(_MOST_REASONS)]
    more = f"<p>and {len(counts) - _MOST_REASONS} more reasons</p>" if len(counts) > _MOST_REASONS else ""
    return _table(("stage", "trials", "reason"), rows) + more


def _environment(archive: Archive) -> str:
    seen: dict[str, dict[str, None]] = {}
    for trial in archive:
        for key, value in trial.fingerprint.items():
            seen.setdefault(key, {})[value if isinstance(value, str) else json.dumps(value)] = None
    # A run that was resumed elsewhere shows every value it ran under.
    return _table(("", ""), [(_safe(key), _safe(" / ".join(values))) for key, values in seen.items()])


def _section(title: str, content: str, note: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p class='note'>{escape(note)}</p>{content}</section>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _safe(words: object) -> str:
    return escape(text.plain(words))


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root { color-scheme: light dark;
  --text: #1d2433; --soft: #667085; --line: #e2e6ee; --card: #f6f8fb; --page: #fff; --link: #2563eb; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9f0; --soft: #98a2b5; --line: #2b3242; --card: #1a2030; --page: #10141d; --link: #7aa7ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 76rem; background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
a { color: var(--link); }
.note { color: var(--soft); margin: 0 0 .5rem; font-size: .9rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.3rem 0; }
.cards div { flex: 1 1 9rem; padding: .8rem 1rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.cards b { display: block; font-size: 1.55rem; line-height: 1.2; }
.cards span { color: var(--soft); font-size: .88rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 0 2rem; }
.charts section { min-width: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
td { white-space: nowrap; }
td:last-child { white-space: normal; min-width: 12rem; overflow-wrap: anywhere; }
code { font-size: .84rem; white-space: nowrap; }
.js-plotly-plot :is(.xtick, .ytick, .infolayer, .legend, .cbaxis) text { fill: var(--text) !important; }
</style>
<script>$plotly</script>
</head>
<body>
<h1>$title</h1>
<p class="note">$state</p>
<p>$searched</p>
$headline
<h2>Front</h2>
<p class="note">Every complete trial. Point at one to see what it is; double-click to see all again.</p>
$front
<h2>Points of the front</h2>
$points
<div class="charts">$charts</div>
<h2>Failures</h2>
$failures
<h2>Environment</h2>
$environment
<script>
// The figures were drawn while the page was still growing; they now take the width that they have.
window.dispatchEvent(new Event("resize"));
</script>
</body>
</html>
""")
