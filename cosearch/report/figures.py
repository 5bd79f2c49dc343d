"""The figures of a run, by plotly; the report and W&B draw the same. All text from data is HTML-escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

import numpy as np
import plotly.graph_objects as go

from cosearch.core import pareto
from cosearch.core.archive import Archive
from cosearch.core.metric import UNITS
from cosearch.core.problem import Objective
from cosearch.core.trial import Trial
from cosearch.report import Outcome, Run, text
from cosearch.report.pareto import knee, predicted_and_measured

_COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#a855f7", "#06b6d4", "#84cc16", "#ec4899", "#a16207")
_REFERENCE = "#ef4444"
_GREY = "rgba(128,136,150,0.6)"
_STRONG = "#8b93a3"
_GRID = "rgba(128,136,150,0.22)"
_LOG_SPAN = 3.0
_ATTENTION = "architecture.attention"


def front(run: Run, archive: Archive, outcome: Outcome) -> go.Figure:
    """All trials and the front, over the first two objectives (over the trials' order where there is one only)."""
    plane = _Plane(run, archive)
    complete = [trial for trial in archive if run.problem.losses(trial.values, archive.reference) is not None]
    feasible = archive.feasible()
    best = archive.front()
    figure = _figure()
    hollow = {"size": 7, "color": "rgba(0,0,0,0)", "line": {"color": _GREY, "width": 1.2}}
    figure.add_trace(plane.dots("infeasible", _without(complete, feasible), hollow))
    dots = {"size": 6, "color": _GREY}
    figure.add_trace(plane.dots("feasible, not on the front", _without(feasible, best), dots))
    if best:
        figure.add_trace(plane.steps(best))
        for trace in _front_dots(run, plane, best):
            figure.add_trace(trace)
    if archive.reference and archive[archive.reference_uid] in complete:
        star = {"size": 15, "symbol": "star", "color": _REFERENCE, "line": {"color": "white", "width": 1}}
        figure.add_trace(plane.dots("reference", [archive[archive.reference_uid]], star))
    if chosen := knee(archive, best):
        ring = {"size": 21, "symbol": "circle-open", "color": _STRONG, "line": {"width": 2}}
        figure.add_trace(plane.dots("knee", [chosen], ring))
    _add_plain(figure, plane, archive, outcome)
    figure.update_xaxes(**plane.axis(0))
    figure.update_yaxes(**plane.axis(1))
    if best and archive.reference and plane.axis(1).get("type") != "log":
        figure.update_yaxes(range=plane.around([*best, archive[archive.reference_uid]]))
    return figure.update_layout(height=540)


def hypervolume(archive: Archive) -> go.Figure:
    """How the hypervolume of the front grew with the trials."""
    volumes = hypervolumes(archive)
    line = {"shape": "hv", "color": _COLOURS[0], "width": 2}
    figure = _figure()
    figure.add_trace(go.Scatter(x=list(range(1, len(volumes) + 1)), y=volumes, mode="lines", line=line))
    figure.update_xaxes(title="trials", rangemode="tozero")
    figure.update_yaxes(title="hypervolume", rangemode="tozero")
    return figure.update_layout(height=340, showlegend=False)


def hypervolumes(archive: Archive) -> list[float]:
    """The hypervolume after each trial, as the front stood then."""
    settled = {trial.uid for trial in archive.settled()}
    kept = archive.losses([])
    volumes: list[float] = []
    for trial in archive:
        volume = volumes[-1] if volumes else 0.0
        if trial.uid in settled:
            losses = np.vstack([kept, archive.losses([trial])])
            kept = losses[pareto.front(losses)]
            volume = pareto.hypervolume(kept)
        volumes.append(volume)
    return volumes


def prediction(run: Run, archive: Archive, name: str) -> go.Figure | None:
    """A predicted metric against the measured one, with the predictions' intervals; None where there are none."""
    trials = predicted_and_measured(archive, name)
    if not trials:
        return None
    measured = [trial.values[name] for trial in trials]
    predictions = [trial.predictions[name] for trial in trials]
    size, unit = text.scale(name, median(measured))
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, p.interval[1] - p.value) / size if p.interval else 0.0 for p in predictions],
        "arrayminus": [max(0.0, p.value - p.interval[0]) / size if p.interval else 0.0 for p in predictions],
        "color": _GREY,
        "thickness": 1.2,
        "width": 0,
    }
    ends = [
        min(*measured, *(p.value for p in predictions)) / size,
        max(*measured, *(p.value for p in predictions)) / size,
    ]
    figure = _figure()
    figure.add_trace(
        go.Scatter(x=ends, y=ends, mode="lines", line={"color": _STRONG, "dash": "dot"}, hoverinfo="skip", name="equal")
    )
    figure.add_trace(
        go.Scatter(
            x=[value / size for value in measured],
            y=[p.value / size for p in predictions],
            error_y=bars,
            mode="markers",
            marker={"size": 7, "color": _COLOURS[0]},
            name="trial",
            text=[_hover(run, trial) for trial in trials],
            hovertemplate="%{text}<extra></extra>",
        )
    )
    scaling = _scaling(name, measured)
    figure.update_xaxes(title=f"measured {_title(name, unit)}", **scaling)
    figure.update_yaxes(title=f"predicted {_title(name, unit)}", **scaling)
    return figure.update_layout(height=340, showlegend=False)


class _Plane:
    """The plane of the first two objectives, each in the unit that its values read best in."""

    def __init__(self, run: Run, archive: Archive) -> None:
        self._run = run
        self._order = {trial.uid: float(index) for index, trial in enumerate(archive, start=1)}
        shown = run.problem.objectives[:2]
        self._objectives: tuple[Objective | None, ...] = shown if len(shown) == 2 else (None, *shown)
        self._values = [
            [trial.values[objective.metric] for trial in archive if objective.metric in trial.values]
            if objective
            else list(self._order.values())
            for objective in self._objectives
        ]
        self._scales = [
            text.scale(objective.metric, median(values or [1.0])) if objective else (1.0, "")
            for objective, values in zip(self._objectives, self._values, strict=True)
        ]
        self._predicted = {
            name for trial in archive for name, metric in trial.metrics.items() if metric.source == "predicted"
        }

    def at(self, uid: str, values: Mapping[str, float]) -> tuple[float, float] | None:
        """Where a trial stands, or None where a metric is missing."""
        if any(objective and objective.metric not in values for objective in self._objectives):
            return None
        x, y = (
            values[objective.metric] / size if objective else self._order[uid]
            for objective, (size, _) in zip(self._objectives, self._scales, strict=True)
        )
        return x, y

    def dots(self, name: str, trials: Sequence[Trial], marker: Mapping[str, Any]) -> go.Scatter:
        """Trials as markers that tell all about themselves."""
        found = [(place, trial) for trial in trials if (place := self.at(trial.uid, trial.values))]
        return go.Scatter(
            x=[place[0] for place, _ in found],
            y=[place[1] for place, _ in found],
            mode="markers",
            name=name,
            marker=dict(marker),
            text=[_hover(self._run, trial) for _, trial in found],
            hovertemplate="%{text}<extra></extra>",
        )

    def steps(self, best: Sequence[Trial]) -> go.Scatter:
        """The border of what the front dominates in this plane."""
        places = [place for trial in best if (place := self.at(trial.uid, trial.values))]
        signs = [-1.0 if objective and objective.goal == "maximize" else 1.0 for objective in self._objectives]
        if self._objectives[0] is None:
            places = []
        # With a third objective not every point of the front is on the border in the first two.
        border = pareto.front(np.array(places).reshape(-1, 2) * signs)
        places = sorted(places[index] for index in border)
        shape = "hv" if signs[0] > 0 else "vh"
        return go.Scatter(
            x=[x for x, _ in places],
            y=[y for _, y in places],
            mode="lines",
            name="front",
            line={"shape": shape, "color": _STRONG, "width": 1.5},
            hoverinfo="skip",
            showlegend=False,
        )

    def around(self, trials: Sequence[Trial]) -> tuple[float, float]:
        """The part of the y axis where `trials` are, with room; far-off failures would flatten the front."""
        heights = [place[1] for trial in trials if (place := self.at(trial.uid, trial.values))]
        low, high = min(heights), max(heights)
        room = max(high - low, 0.02 * abs(high))
        return low - 0.8 * room, high + 1.2 * room

    def source(self, metric: str) -> str:
        """What stands before the name of a metric that is not measured."""
        return "predicted " if metric in self._predicted else ""

    def axis(self, index: int) -> dict[str, Any]:
        """The settings of the x (0) or y (1) axis."""
        objective = self._objectives[index]
        if objective is None:
            return {"title": "trials"}
        better = "lower is better" if objective.goal == "minimize" else "higher is better"
        title = f"{self.source(objective.metric)}{_title(objective.metric, self._scales[index][1])}, {better}"
        return {"title": title, **_scaling(objective.metric, self._values[index])}


def _front_dots(run: Run, plane: _Plane, best: Sequence[Trial]) -> list[go.Scatter]:
    marker = {"size": 11, "line": {"color": "white", "width": 1}}
    if len(run.problem.objectives) > 2:
        third = run.problem.objectives[2].metric
        size, unit = text.scale(third, median(trial.values[third] for trial in best))
        bar = {"title": plane.source(third) + _title(third, unit), "thickness": 12, "len": 0.7, "outlinewidth": 0}
        values = [trial.values[third] / size for trial in best]
        return [plane.dots("front", best, marker | {"color": values, "colorscale": "Viridis", "colorbar": bar})]
    groups: dict[str, list[Trial]] = {}
    for trial in best:
        groups.setdefault(text.worded(trial.candidate.point.get(_ATTENTION)), []).append(trial)
    return [
        plane.dots(f"front: {escape(name)}", groups[name], marker | {"color": _COLOURS[index % len(_COLOURS)]})
        for index, name in enumerate(sorted(groups))
    ]


def _add_plain(figure: go.Figure, plane: _Plane, archive: Archive, outcome: Outcome) -> None:
    """The same architecture compiled the plain way, joined to the point it was measured beside."""
    comparison = outcome.comparison
    if comparison is None or comparison.uid not in archive:
        return
    # Of a plain compilation that is no trial only the latency is known, and what no schedule can change.
    quality = {name: value for name, value in archive[comparison.uid].values.items() if name in _BY_WEIGHTS}
    known = archive[comparison.plain_uid].values if comparison.plain_uid in archive else quality
    start = plane.at(comparison.uid, archive[comparison.uid].values)
    # As many times slower as it was side by side: the machine may have been faster when the point was measured.
    latency_s = archive[comparison.uid].values["latency_s"] * comparison.speedup
    end = plane.at(comparison.uid, {**known, "latency_s": latency_s})
    if start is None or end is None:
        return
    figure.add_trace(
        go.Scatter(
            x=[start[0], end[0]],
            y=[start[1], end[1]],
            mode="lines+markers",
            name="same architecture, compiled plainly",
            line={"color": _STRONG, "dash": "dot", "width": 1.5},
            marker={"symbol": "diamond-open", "size": [0, 12], "color": _STRONG, "line": {"width": 2}},
            text=["", f"compiled the plain way, measured side by side<br>{escape(text.speedup(comparison))}"],
            hovertemplate="%{text}<extra></extra>",
        )
    )


_BY_WEIGHTS = frozenset({"bits_per_byte", "recall_accuracy", "parameters"})


def _without(trials: Sequence[Trial], others: Sequence[Trial]) -> list[Trial]:
    left_out = {trial.uid for trial in others}
    return [trial for trial in trials if trial.uid not in left_out]


def _hover(run: Run, trial: Trial) -> str:
    found = text.differences(trial.candidate, run.space.reference)
    short = text.names(found)
    lines = [f"<b>{trial.uid}</b>"]
    for name, metric in trial.metrics.items():
        between = f" [{' to '.join(text.figure(name, end) for end in metric.interval)}]" if metric.interval else ""
        lines.append(f"{escape(text.label(name))}: {text.figure(name, metric.value)}{between} ({metric.source})")
    lines.append("<i>differs from the reference in</i>" if found else "<i>the reference</i>")
    lines += [f"{escape(short[knob])}: {escape(text.worded(value))}" for knob, value in found.items()]
    return "<br>".join(lines)


def _title(metric: str, unit: str) -> str:
    per = " per token" if UNITS.get(metric, "").endswith("/token") else ""
    return f"{text.label(metric)}{f' ({unit}{per})' if unit else ''}"


def _scaling(metric: str, values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis for what a token costs, where it spans enough to have ticks at 1, 2 and 5."""
    if (
        not UNITS.get(metric, "").endswith("/token")
        or not values
        or min(values) <= 0
        or max(values) < _LOG_SPAN * min(values)
    ):
        return {"type": "linear"}
    return {"type": "log", "dtick": "D2", "tickformat": "~g"}


def _figure() -> go.Figure:
    axis = {"gridcolor": _GRID, "zeroline": False, "linecolor": _GRID, "automargin": True}
    return go.Figure(
        layout={
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#667085"},
            "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "hoverlabel": {"align": "left"},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": _GREY, "activecolor": _STRONG},
        }
    )
