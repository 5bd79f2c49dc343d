"""How figures, choices and verdicts are worded for people: the terminal, the report and W&B say the same."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from cosearch.core.candidate import Candidate, Value
from cosearch.core.metric import UNITS, Metric, Metrics
from cosearch.core.problem import Problem
from cosearch.core.trial import Trial
from cosearch.measure.timing import Verdict
from cosearch.report import Comparison

_LABELS = {
    "latency_s": "latency",
    "energy_j": "energy",
    "memory_bytes": "memory",
    "weight_bytes": "weight size",
    "cache_bytes": "cache size",
    "copied_bytes": "cache copied a step",
    "bits_per_byte": "bits/byte",
    "recall_accuracy": "recall",
    "numerical_error": "numerical error",
    "portable_error": "numerical error of the portable program, here",
    "compile_s": "compile time",
}
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_SCALES = {
    "s/token": _SECONDS,
    "s": _SECONDS,
    "J/token": ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ"), (1e-9, "nJ")),
    "bytes": ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
    "count": ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")),
    "fraction": ((0.01, "%"),),
}


def plain(text: object, limit: int = 300) -> str:
    """`text` on one line, without the control characters by which it could steer a terminal, and clipped."""
    line = str(text)
    if not line.isprintable():
        line = "".join(
            " " if letter.isspace() else letter for letter in line if letter.isspace() or letter.isprintable()
        )
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def label(metric: str) -> str:
    """A metric's name in a heading."""
    return _LABELS.get(metric, metric)


def scale(metric: str, value: float) -> tuple[float, str]:
    """The size and the name of the unit in which such a value reads best: (1e-6, 'µs') for a latency of 312e-6 s."""
    scales = _SCALES.get(UNITS.get(metric, ""), ((1.0, ""),))
    return next((one for one in scales if abs(value) >= one[0]), scales[-1])


def figure(metric: str, value: float) -> str:
    """A value with its unit, to three digits: '312 µs'."""
    if metric == "bits_per_byte":
        return f"{value:.3f}"
    size, unit = scale(metric, value)
    return f"{_three_digits(value / size)} {unit}".rstrip()


def duration(seconds: float) -> str:
    """'1 h 05 min', '4 min 10 s' or '12 s'."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def worded(value: Value | None) -> str:
    """A choice; '–' for a knob that the candidate does not have."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case tuple():
            return ", ".join(map(worded, value)) or "none"
    return plain(value)


def names(knobs: Iterable[str]) -> dict[str, str]:
    """Knob to its name without the axis, where no other of these knobs is called the same."""
    knobs = list(knobs)
    bare = Counter(knob.partition(".")[2] for knob in knobs)
    return {knob: plain(knob.partition(".")[2] if bare[knob.partition(".")[2]] == 1 else knob) for knob in knobs}


def varying(trials: Iterable[Trial]) -> list[str]:
    """The knobs in which the trials differ, in the order of the axes."""
    points = [trial.candidate.point for trial in trials]
    knobs = dict.fromkeys(knob for point in points for knob in point)
    return [knob for knob in knobs if len({repr(point.get(knob)) for point in points}) > 1]


def differences(candidate: Candidate, reference: Candidate) -> dict[str, Value]:
    """The choices that the reference does not make."""
    plainly = reference.point
    return {knob: value for knob, value in candidate.point.items() if knob not in plainly or plainly[knob] != value}


def choices(candidate: Candidate, reference: Candidate) -> str:
    """In what a candidate differs from the reference, by axis: 'architecture: depth 4; precision: weights int8'."""
    axes: dict[str, list[str]] = {}
    for knob, value in differences(candidate, reference).items():
        axis, _, name = knob.partition(".")
        axes.setdefault(axis, []).append(f"{plain(name)} {worded(value)}")
    return "; ".join(f"{axis}: {', '.join(chosen)}" for axis, chosen in axes.items()) or "the reference"


def told(name: str, metric: Metric) -> str:
    """A figure that says where it is from: '312 µs', or 'predicted 312 µs [125 µs, 780 µs]'."""
    if metric.source == "measured":
        return figure(name, metric.value)
    between = f" [{', '.join(figure(name, end) for end in metric.interval)}]" if metric.interval else ""
    return f"{metric.source} {figure(name, metric.value)}{between}"


def objectives(problem: Problem, metrics: Metrics) -> str:
    """The objectives that are known: 'latency 312 µs, bits/byte 2.910'."""
    known = (objective.metric for objective in problem.objectives if objective.metric in metrics)
    return ", ".join(f"{label(name)} {told(name, metrics[name])}" for name in known)


def broken(problem: Problem, values: Mapping[str, float], reference: Mapping[str, float]) -> list[str]:
    """Which constraints are broken, and by how much."""
    found = []
    for constraint in problem.constraints:
        excess = constraint.excess(values, reference)
        if excess != 0:
            by = f"by {100 * excess:.1f} %" if math.isfinite(excess) else "(it has no such figure)"
            found.append(f"{plain(constraint)} {by}")
    return found


def verdict(problem: Problem, trial: Trial, reference: Mapping[str, float]) -> str:
    """'ok', or what is wrong with a trial."""
    if trial.failure:
        return f"rejected at {plain(trial.failure.stage)}: {plain(trial.failure.reason)}"
    wrong = broken(problem, trial.values, reference)
    busy = any(metric.contended for metric in trial.metrics.values())
    return f"breaks {' and '.join(wrong)}" if wrong else "ok, timed on a busy machine" if busy else "ok"


def speedup(comparison: Comparison) -> str:
    """The side-by-side result in words; a difference is claimed only where the verdict is one."""
    low, high = comparison.interval
    ratio = f"{comparison.speedup:.3g}x [{low:.3g}, {high:.3g}]"
    if comparison.verdict == Verdict.FASTER:
        claim = f"{ratio} faster than the same architecture compiled the plain way"
    elif comparison.verdict == Verdict.SLOWER:
        claim = f"{ratio} the speed of the same architecture compiled the plain way, which is slower"
    else:
        claim = f"no difference to the same architecture compiled the plain way could be shown: {ratio} its speed"
    return f"{claim}, measured side by side"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
