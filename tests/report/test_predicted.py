"""Of a chip that is not here every latency is predicted, and says so wherever it is shown."""

import json
from dataclasses import replace

import pytest

from cosearch.core.metric import predicted
from cosearch.core.problem import Objective
from cosearch.core.trial import Trial
from cosearch.report import Outcome, Run, figures, pareto, text
from cosearch.report.console import ConsoleTracker
from cosearch.report.html import page
from cosearch.report.wandb import WandbTracker
from tests.report.samples import TRIALS, make_run

WHY = "chip is not attached"


def from_afar(trial: Trial) -> Trial:
    """The same trial with its latency predicted."""
    if trial.failure:
        return trial
    value = trial.metrics["latency_s"].value
    latency = predicted("latency_s", value, (value / 2.5, value * 2.5))
    return replace(trial, metrics={**trial.metrics, "latency_s": latency})


def with_energy(trial: Trial) -> Trial:
    """The same trial, measured, with an energy that is predicted."""
    if trial.failure:
        return trial
    joules = 50 * trial.metrics["latency_s"].value
    return replace(trial, metrics={**trial.metrics, "energy_j": predicted("energy_j", joules, (joules / 3, joules))})


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_energy_that_nobody_counted_says_so_beside_a_latency_that_is_measured(tmp_path, fill, capsys, place: int):
    run = make_run(tmp_path)
    objectives = [*run.problem.objectives]
    objectives.insert(place, Objective.parse("minimize energy_j"))
    run = replace(run, problem=replace(run.problem, objectives=tuple(objectives)))
    archive = fill(run, tuple(map(with_energy, TRIALS)))
    tracker = ConsoleTracker(run)
    for trial in archive:
        tracker.log(trial, archive)
    tracker.finish(archive, Outcome())
    out = capsys.readouterr().out
    shown = [line for line in out.splitlines() if "mJ" in line]
    assert len(shown) > 6 and all("predicted " in line for line in shown), shown
    assert "energy predicted 20 mJ [6.67 mJ, 20 mJ]" in out and "latency 400 µs" in out
    table = page(run, archive, Outcome()).partition("<table>")[2].partition("</table>")[0]
    assert table.count("mJ</span><i> predicted</i>") == len(archive.front()) == table.count("<i> predicted</i>")
    drawn = str(figures.front(run, archive, Outcome()).to_json())
    assert "predicted energy (mJ per token)" in drawn and "predicted latency" not in drawn
    (point, *_) = pareto.document(run, archive, Outcome())["points"]
    assert (point["metrics"]["energy_j"]["source"], point["metrics"]["energy_j"]["unit"]) == ("predicted", "J/token")
    picture = WandbTracker(run)._picture(archive, Outcome())
    assert "predicted/energy_j" in picture["columns"] and "energy_j" not in picture["columns"]


@pytest.fixture
def run(tmp_path) -> Run:
    run = make_run(tmp_path)
    return replace(run, problem=replace(run.problem, target=replace(run.problem.target, attached=False)))


@pytest.fixture
def archive(run, fill):
    return fill(run, tuple(map(from_afar, TRIALS)))


def test_on_the_console(run, archive, capsys):
    tracker = ConsoleTracker(run)
    tracker.start(archive)
    for trial in archive:
        tracker.log(trial, archive)
    tracker.finish(archive, Outcome(why_no_comparison=WHY))
    out = capsys.readouterr().out
    assert "chip is not attached" in out.splitlines()[2]
    shown = [line for line in out.splitlines() if " µs" in line or " ms" in line]
    assert len(shown) > 6
    assert all("predicted" in line for line in shown), shown
    assert "latency predicted 400 µs [160 µs, 1 ms], bits/byte 2.950" in out
    assert f"not compared with the plain way: {WHY}" in out


def test_in_the_report(run, archive):
    html = page(run, archive, Outcome())
    assert "No chip was attached: latencies are predicted" in html
    table = html.partition("<table>")[2].partition("</table>")[0]
    assert table.count("µs") and table.count("<i> predicted</i>") == len(archive.front())
    assert "measured side by side" not in html
    drawn = json.loads(figures.front(run, archive, Outcome()).to_json() or "{}")
    assert drawn["layout"]["xaxis"]["title"]["text"].startswith("predicted latency")


def test_in_the_files_for_programs(run, archive):
    told = pareto.document(run, archive, Outcome())
    assert told["problem"]["target"]["attached"] is False
    assert {point["metrics"]["latency_s"]["source"] for point in told["points"]} == {"predicted"}
    assert told["prediction_error"]["latency_s"] is None, "a prediction is not compared with itself"


def test_at_wandb_it_has_no_measured_name(run, archive):
    tracker = WandbTracker(run)
    tracker.log(next(iter(archive)), archive)
    row = tracker._queue.get_nowait()["row"]  # pyright: ignore[reportOptionalSubscript]
    assert "latency_s" not in row and row["predicted/latency_s"] == 1e-3 and row["bits_per_byte"] == 3.0
    picture = tracker._picture(archive, Outcome())
    assert "predicted/latency_s" in picture["columns"] and "latency_s" not in picture["columns"]
    assert picture["plane"] == ["predicted/latency_s", "bits_per_byte"]


def test_what_is_measured_is_worded_without_its_source():
    assert text.told("latency_s", TRIALS[0].metrics["latency_s"]) == "1 ms"
    assert text.told("latency_s", from_afar(TRIALS[0]).metrics["latency_s"]) == "predicted 1 ms [400 µs, 2.5 ms]"
