"""What calibrations tell of operations that were not measured, and which are refused."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosearch.core.target import Target
from cosearch.latency import absent
from cosearch.latency.calibration import Calibration, Shot, Subject, subjects
from cosearch.latency.tables import Operations
from cosearch.targets import TARGETS


def subject(target: str, kind: str) -> Subject:
    peaks = {
        "platform": "cpu",
        "peak_flops_per_s": {"float32": 1e11},
        "bandwidth_bytes_per_s": 4e10,
        "overhead_s": 1e-6,
    }
    return next(one for one in subjects(TARGETS[target].target(Path(), lambda: peaks)) if one.kind == kind)


def rows(kind: str, **columns: list) -> Operations:
    return Operations(kind, {name: np.array(values) for name, values in columns.items()})


def predicted(own: Subject, shots: list[Shot], operations: Operations) -> np.ndarray:
    posterior, places = own.adapted(Calibration("made up", {}, tuple(shots), ()), operations)
    return posterior.predict(places)[0]


def test_shots_are_what_they_were_measured_as_whatever_is_predicted_from_them():
    """In NumPy, an array of "fp8" has no room for "bfloat16"."""
    gemm = subject("h100", "gemm")
    sizes = {"m": 16, "n": 4096, "k": 4096}
    shots = [Shot("gemm", {"dtype": "bfloat16", **sizes}, 5e-4, [5e-4])]
    narrow = rows("gemm", dtype=["fp8"], m=[16], n=[4096], k=[4096])
    both = rows("gemm", dtype=["fp8", "bfloat16"], m=[16] * 2, n=[4096] * 2, k=[4096] * 2)
    alone, together = predicted(gemm, shots, narrow), predicted(gemm, shots, both)
    assert np.isfinite(alone).all()
    assert alone[0] == pytest.approx(together[0])


@pytest.mark.parametrize("target", ["a100", "l40s"])
def test_what_may_be_measured_fits_with_its_scores(target: str):
    capacity_bytes = TARGETS[target].target(Path(), dict).capacity_bytes
    drawn = subject(target, "attn_context").draw(np.random.default_rng(0))
    assert len(drawn) == 500
    sizes = drawn.columns
    scores_bytes = 4 * sizes["batch"] * sizes["heads"] * sizes["tokens"].astype(float) ** 2
    assert capacity_bytes / 100 < scores_bytes.max() <= capacity_bytes / 8


@dataclass(frozen=True)
class Foreign:
    """A GPU of somebody else's, that no literal describes."""

    known: Target

    def target(self, cache: Path, measure_peaks: Any) -> Target:
        return self.known


def test_of_a_gpu_that_no_literal_describes_products_are_calibrated(monkeypatch: pytest.MonkeyPatch):
    known = replace(TARGETS["h100"].target(Path(), dict), name="foreign")
    monkeypatch.setitem(TARGETS._entries, "foreign", Foreign(known))
    assert [one.kind for one in subjects(known)] == ["product"]
    assert absent.model(known) == "roofline 2 of the compiled program"
