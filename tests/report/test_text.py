import dataclasses

import pytest

from cosearch.report import Comparison, text
from tests.report.samples import FAST, HOSTILE, SMALL, TRIALS


@pytest.mark.parametrize(
    ("metric", "value", "words"),
    [
        ("latency_s", 312e-6, "312 µs"),
        ("latency_s", 1.9e-3, "1.9 ms"),
        ("compile_s", 0.0, "0 ns"),
        ("memory_bytes", 3 * 2**20, "3 MiB"),
        ("memory_bytes", 1023 * 2**20, "1023 MiB"),
        ("memory_bytes", 12, "12 B"),
        ("bits_per_byte", 2.91, "2.910"),
        ("recall_accuracy", 0.931, "93.1 %"),
        ("parameters", 1_234_567, "1.23 M"),
        ("numerical_error", 0.00123, "0.00123"),
    ],
)
def test_figures_are_humanised(metric, value, words):
    assert text.figure(metric, value) == words


@pytest.mark.parametrize(("seconds", "words"), [(-3, "0 s"), (12, "12 s"), (250, "4 min 10 s"), (3900, "1 h 05 min")])
def test_durations(seconds, words):
    assert text.duration(seconds) == words


def test_plain_text_is_one_clipped_line_without_control_characters():
    assert text.plain("a\x1b]0;x\x07\r\n\tb\u202e\ud800c") == "a]0;x bc"
    assert text.plain(HOSTILE).isprintable()
    assert len(text.plain("x" * 999)) == 300


def test_choices_are_those_the_reference_does_not_make(run):
    reference = run.space.reference
    assert text.choices(SMALL.candidate, reference) == "architecture: attention gqa, mha"
    assert text.choices(reference, reference) == "the reference"
    assert text.varying(TRIALS[:2]) == ["architecture.attention", "precision.weights"]
    assert text.names(["architecture.attention", "schedule.attention", "precision.weights"]) == {
        "architecture.attention": "architecture.attention",
        "schedule.attention": "schedule.attention",
        "precision.weights": "weights",
    }


def test_verdicts_name_the_constraint_and_by_how_much_it_is_broken(run, archive):
    verdicts = [text.verdict(run.problem, trial, archive.reference) for trial in archive]
    assert verdicts[1] == "ok"
    assert verdicts[3] == "breaks bits_per_byte <= 1.1 * reference by 9.1 %"
    assert verdicts[6].startswith("rejected at verify: <script>")
    missing = dataclasses.replace(FAST, metrics={})
    assert "(it has no such figure)" in text.verdict(run.problem, missing, archive.reference)


@pytest.mark.parametrize(
    ("ratio", "interval", "words"),
    [
        (1.9, (1.8, 2.0), "1.9x [1.8, 2] faster than"),
        (0.9, (0.8, 0.95), "which is slower"),
        (1.0, (0.9, 1.1), "no difference"),
    ],
)
def test_a_speedup_is_claimed_only_where_the_rounds_show_one(ratio, interval, words):
    told = text.speedup(Comparison("a", "b", 1.0, ratio, ratio, interval, (1.0,) * 40, (ratio,) * 40))
    assert words in told
    assert told.endswith("measured side by side")
