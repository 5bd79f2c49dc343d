import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cosearch.core.problem import Objective
from cosearch.core.trial import Failure
from cosearch.report import Outcome, figures
from cosearch.report.html import HtmlTracker, page
from tests.report.samples import FAST, KNEE, TRIALS, make_run, make_trial


class _Page(HTMLParser):
    """What a browser would fetch and show; scripts are kept apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.shown = ""
        self.tags: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._inside = tag
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.shown += data


@pytest.fixture
def report(run, archive, outcome) -> str:
    return page(run, archive, outcome)


def test_it_needs_no_network(report):
    fetched = _Page(report).fetched
    assert fetched == ["data:,", f"artifacts/{KNEE.uid}/"]
    assert "@import" not in report
    assert not re.search(r"<script[^>]*\ssrc", report)


def test_hostile_names_are_shown_and_not_run(run, archive, report):
    shown = _Page(report)
    assert "<script>alert(1)</script>[bold red]x[/]" in shown.shown
    assert "$page" in shown.shown
    assert "<script>alert(1)" not in report
    assert not [letter for letter in shown.shown if letter in "\x1b\x07"]
    plain = page(run, archive, Outcome())
    assert shown.tags.count("script") == _Page(plain).tags.count("script")


def test_it_tells_what_was_searched_and_found(report):
    shown = " ".join(_Page(report).shown.split())
    for words in (
        "chip",
        "chat: decode of batch 1 at context 128",
        "minimize latency_s, minimize bits_per_byte",
        "bits_per_byte <= 1.1 * reference",
        "1.9x [1.8, 2] faster than the same architecture compiled the plain way, measured side by side",
        "3 trials, mean error 19.6%, 67% inside the 90 % interval.",
        "400 µs",
        "2.950",
        "0.10.2",
        "verify",
    ):
        assert words in shown
    assert 'id="front"' in report
    assert 'id="predicted-latency_s"' in report


@pytest.mark.parametrize(
    "trials",
    [
        (),
        (make_trial(failure=Failure("compile", "no")),),
        (make_trial(),),
        (make_trial(), make_trial(bits=9.0, precision__weights="int8")),
    ],
)
def test_a_run_that_found_little_has_a_report(run, fill, trials):
    assert 'id="front"' in page(run, fill(run, trials), Outcome())


def test_where_nothing_is_feasible_the_nearest_are_shown(run, fill):
    strict = make_run(run.folder, bound="0.5 * reference")
    shown = _Page(page(strict, fill(strict), Outcome())).shown
    assert "No trial satisfies the constraints" in shown
    assert "breaks bits_per_byte <= 0.5 * reference by 94.0 %" in shown


def test_it_is_written_during_the_search_and_at_its_end(run, archive, outcome):
    tracker = HtmlTracker(run)
    tracker.start(archive)
    tracker.log(TRIALS[-1], archive)
    report = run.folder / "report.html"
    assert "still running" in report.read_text()
    tracker.log(TRIALS[-1], archive)
    tracker.finish(archive, outcome)
    assert "has ended" in report.read_text()
    assert [path.name for path in run.folder.glob(".report*")] == []


def test_a_report_that_cannot_be_written_stops_nothing(run, archive, capsys):
    tracker = HtmlTracker(run)
    (run.folder / "report.html").mkdir()
    tracker.log(TRIALS[-1], archive)
    tracker.finish(archive, Outcome())
    assert "could not be written" in capsys.readouterr().err


def test_hypervolumes_end_at_the_archives_and_never_fall(archive):
    volumes = figures.hypervolumes(archive)
    assert len(volumes) == len(archive)
    assert volumes == sorted(volumes)
    assert volumes[-1] == pytest.approx(archive.hypervolume())


def test_the_front_is_drawn_as_steps_and_the_plain_compilation_beside_its_point(run, archive, outcome):
    traces = {trace["name"]: trace for trace in figures.front(run, archive, outcome).to_dict()["data"]}
    steps = traces["front"]
    assert steps["line"]["shape"] == "hv"
    assert steps["x"] == pytest.approx([312, 400, 600])
    plain = traces["same architecture, compiled plainly"]
    assert plain["x"] == pytest.approx([400, 760])
    assert plain["y"] == [2.95, 2.95]
    assert traces["infeasible"]["y"] == [3.6]
    assert len(traces["feasible, not on the front"]["x"]) == 2
    [hostile] = [trace for name, trace in traces.items() if name.startswith("front: &lt;script&gt;")]
    assert FAST.uid in hostile["text"][0]
    assert "<script>" not in hostile["text"][0]


def test_a_maximised_first_objective_turns_the_steps_and_a_single_one_is_drawn_over_the_trials(run, archive):
    def steps(*objectives: str) -> dict[str, Any]:
        problem = replace(run.problem, objectives=tuple(map(Objective.parse, objectives)))
        other = replace(run, problem=problem)
        archive.problem = problem
        traces = figures.front(other, archive, Outcome()).to_dict()["data"]
        return next(trace for trace in traces if trace["name"] == "front")

    turned = steps("maximize latency_s", "minimize bits_per_byte")
    assert turned["line"]["shape"] == "vh"
    assert turned["y"] == sorted(turned["y"])
    assert turned["x"] == sorted(turned["x"])
    assert len(turned["x"]) == 3
    assert steps("minimize latency_s")["x"] == []


@pytest.mark.browser
def test_a_browser_draws_it(run, archive, outcome):
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    path = run.folder / "report.html"
    path.write_text(page(run, archive, outcome), encoding="utf-8")
    chromium = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page()
        wrong: list[str] = []
        tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda sent: wrong.append(sent.url) if sent.url.startswith("http") else None)
        tab.goto(path.as_uri())
        tab.wait_for_selector("#front .scatterlayer .point")
        assert tab.locator("#front .scatterlayer .point").count() >= len(TRIALS) - 1
        assert tab.locator("#hypervolume .scatterlayer path").count() > 0
        browser.close()
    assert wrong == []
