import json

import pytest

from cosearch.core.metric import measured
from cosearch.core.trial import Confirmation, Failure
from cosearch.report import Outcome
from cosearch.report.pareto import document, knee, write
from cosearch.report.text import verdict
from tests.report.samples import FAST, HOSTILE, KNEE, SMALL, make_trial


def test_the_written_document_keeps_its_contract(run, archive, outcome):
    write(run, archive, outcome)
    data = json.loads((run.folder / "pareto.json").read_text())
    assert data == document(run, archive, outcome)
    assert data["version"] == 2
    assert data["experiment"] == "tiny"
    assert data["problem"] == run.problem.to_json()
    assert data["objectives"] == [
        {"name": "latency_s", "unit": "s/token", "goal": "minimize"},
        {"name": "bits_per_byte", "unit": "bits/byte", "goal": "minimize"},
    ]
    assert data["hypervolume"] == pytest.approx(archive.hypervolume())
    assert data["trials"] == {"total": 7, "failed": 1, "considered": 7, "compiled": 0, "measured": 7}
    assert data["reference"]["uid"] == run.space.reference.uid
    assert data["reference"]["metrics"]["bits_per_byte"]["value"] == 3.0
    assert [point["uid"] for point in data["points"]] == [FAST.uid, KNEE.uid, SMALL.uid]
    assert data["knee"] == KNEE.uid
    assert data["comparison"]["interval"] == [1.8, 2.0]
    assert data["comparison"]["samples_s"] == [4e-4] * 30

    fast, chosen, small = data["points"]
    assert fast["metrics"]["latency_s"] == {
        "value": 312e-6,
        "unit": "s/token",
        "source": "measured",
        "interval": [pytest.approx(280.8e-6), pytest.approx(343.2e-6)],
    }
    assert fast["candidate"]["architecture.attention"] == HOSTILE
    assert small["candidate"]["architecture.attention"] == ["gqa", "mha"]
    assert (fast["confirmed"], fast["searched"]) == (False, {})
    assert (fast["artifact"], chosen["artifact"]) == (None, f"artifacts/{KNEE.uid}")


def test_predictions_stand_in_no_point_but_their_errors_are_told(run, archive, outcome):
    data = document(run, archive, outcome)
    assert all(metric["source"] == "measured" for point in data["points"] for metric in point["metrics"].values())
    errors = data["prediction_error"]
    assert errors["bits_per_byte"] is None
    assert errors["latency_s"]["count"] == 3
    assert errors["latency_s"]["mape"] == pytest.approx((12 / 312 + 0.5 + 0.05) / 3)
    assert errors["latency_s"]["coverage"] == pytest.approx(2 / 3)


def test_a_reused_measurement_counts_once_for_the_prediction_error(run, fill):
    again = make_trial(1e-3, predicted_s=5e-3, reused=("latency_s",), precision__weights="int8")
    assert document(run, fill(run, (make_trial(), again)), Outcome())["prediction_error"]["latency_s"] is None


def test_a_confirmed_point_has_both_figures(run, archive):
    again = measured("latency_s", 330e-6, samples=(330e-6,) * 20, contended=0.25)
    archive.confirm(Confirmation(FAST.uid, {"latency_s": again}, None, 2.0))
    (point,) = document(run, archive, Outcome())["points"]
    assert point["uid"] == FAST.uid and point["confirmed"]
    assert point["metrics"]["latency_s"]["value"] == 330e-6 and point["metrics"]["latency_s"]["contended"] == 0.25
    assert point["searched"]["latency_s"]["value"] == 312e-6
    assert verdict(run.problem, archive[FAST.uid], archive.reference) == "ok, timed on a busy machine"


@pytest.mark.parametrize("trials", [(), (make_trial(failure=Failure("compile", "no")),)])
def test_a_run_that_found_nothing_has_a_document(run, fill, trials):
    data = document(run, fill(run, trials), Outcome())
    assert data["points"] == []
    assert data["hypervolume"] == 0
    assert data["reference"]["metrics"] == {}
    assert data["knee"] is data["comparison"] is data["prediction_error"]["latency_s"] is None


def test_the_knee_of_no_front_is_none(archive):
    assert knee(archive, []) is None
