"""Calibrating the processor that this runs on, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from cosearch.__main__ import main
from cosearch.core.errors import UserError
from cosearch.latency.calibration import Calibration, Shot, path_of, stored, subjects
from cosearch.report.calibrate import in_turn
from cosearch.targets import TARGETS, workplace
from cosearch.targets.gpu import GPU


@pytest.fixture
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("COSEARCH_CACHE", str(tmp_path))
    return tmp_path


def test_a_calibration_is_kept_with_what_it_ran_on_and_may_be_checked(cache_of_its_own, capsys) -> None:
    assert main(["calibrate", "target=cpu", "shots=2"]) == 0
    found = stored("cpu")
    assert found is not None and len(found.shots) == 2 and found.checks
    assert found.software["jax"] and found.software["processor"]
    for shot in found.shots:
        assert shot.kind == "product" and len(shot.samples_s) >= 3
        assert min(shot.samples_s) <= shot.latency_s <= max(shot.samples_s)
        assert 0 <= shot.contended <= 1 and "contended" in path_of("cpu").read_text()
    assert "saved to" in capsys.readouterr().out

    # What took a hundred times as long then has drifted, however busy this machine is.
    slower = tuple(dataclasses.replace(shot, latency_s=100 * shot.latency_s) for shot in found.shots)
    dataclasses.replace(found, shots=slower, software={**found.software, "jax": "0.0.1"}).save(path_of("cpu"))
    assert main(["calibrate", "target=cpu", "check=2"]) == 2
    said = capsys.readouterr()
    assert "2 of 2 differ" in said.out and "jax was '0.0.1'" in said.out
    assert "no longer holds" in said.err


def test_what_is_no_longer_done_has_drifted(cache_of_its_own, capsys) -> None:
    shot = Shot("fft", {"m": 1}, 1e-6, [1e-6])
    Calibration("cpu", {}, (shot,), ()).save(path_of("cpu"))
    assert main(["calibrate", "target=cpu", "check=1"]) == 2
    said = capsys.readouterr()
    assert "1 of 1 differ" in said.out and "refused" in said.out
    assert "no longer holds" in said.err and "Traceback" not in said.err


def test_each_kind_is_checked_in_its_turn() -> None:
    shots = [Shot(kind, {"m": m}, 1.0, [1.0]) for kind in ("gemm", "attn_context") for m in range(3)]
    told = [(one.kind, one.columns["m"]) for one in in_turn(shots[:5])]
    assert told == [("gemm", 0), ("attn_context", 0), ("gemm", 1), ("attn_context", 1), ("gemm", 2)]


def test_a_machine_that_does_not_answer_is_told_in_a_line(cache_of_its_own, monkeypatch, capsys) -> None:
    monkeypatch.setattr(workplace, "_PROBE_S", 0.0)
    monkeypatch.setattr(GPU, "why_unavailable", lambda self: None)
    assert main(["calibrate", "target=h100"]) == 2
    assert "it took longer than its limit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["target=h10"], "target=h10: unknown; did you mean 'h100'?"),
        (["target=cpu", "shots=0"], "shots=0: must be at least 1"),
        (["target=cpu", "check=-1"], "check=-1: must be at least 0"),
        (["target=cpu", "check=3"], "has no calibration; make one: python -m cosearch calibrate target=cpu"),
        (["shots=3"], "target=… is missing"),
    ],
)
def test_wrong_options_are_refused(cache_of_its_own, arguments, says: str, capsys) -> None:
    assert main(["calibrate", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_damaged_calibrations_are_refused_by_name(cache_of_its_own) -> None:
    path = path_of("h100")
    Calibration("h100", {}, (Shot("gemm", {"m": 1}, 1e-6, [1e-6]),), ()).save(path)
    assert Calibration.load(path).target == "h100"
    Calibration("h100", {}, (), ()).save(path)
    with pytest.raises(UserError, match="is of no operation"):
        Calibration.load(path)
    path.write_text(json.dumps({"version": 0}))
    with pytest.raises(UserError, match="version 0; this cosearch reads"):
        Calibration.load(path)
    path.write_text("{")
    with pytest.raises(UserError, match="is no calibration, or a damaged one"):
        Calibration.load(path)


def test_what_may_be_measured_of_a_gpu_is_what_it_runs(tmp_path) -> None:
    """An A100 has no fp8."""
    found = {}
    for name in ("a100", "h100"):
        [gemm] = [one for one in subjects(TARGETS[name].target(tmp_path, dict)) if one.kind == "gemm"]
        found[name] = set(gemm.draw(np.random.default_rng(0)).columns["dtype"].tolist())
    assert found == {"a100": {"bfloat16"}, "h100": {"bfloat16", "fp8"}}
