"""How wrong predictions are said to be."""

import numpy as np
import pytest

from cosearch.core.errors import UserError
from cosearch.latency.error_card import leave_out, scores
from cosearch.latency.table_model import Training
from cosearch.latency.tables import read
from tests.latency.tables import write


def training_on(folder, rows: int) -> Training:
    write(folder, rows=rows)
    measured = read([folder], "gemm")
    return Training(measured, {one.chip.name: one.chip.generation for one in measured}, [10], steps=50)


def test_scores_are_of_logarithms() -> None:
    truth = np.log([1.0, 2.0, 4.0, 8.0])
    mean = truth + np.log([1.1, 1.1, 0.9, 0.9])
    found = scores(mean, np.full(4, 0.06), truth)  # 90 % intervals of 0.0987 either way: 1.1 is in, 0.9 is out
    assert found["mape"] == pytest.approx(0.1)
    assert found["tau"] == 1.0
    assert found["coverage"] == 0.5
    assert scores(-truth, np.ones(4), truth)["tau"] == -1.0


@pytest.mark.parametrize("rows", [40, 500])
def test_few_rows_are_parted_into_those_to_choose_from_and_those_to_test_on(tmp_path, rows: int) -> None:
    training = training_on(tmp_path, rows)
    before, after = leave_out(training, training.measured[0], [0, 10], 1)
    assert np.isfinite([before["mape"], after["mape"]]).all()
    assert 0 <= after["coverage"] <= 1


def test_too_few_rows_are_refused(tmp_path) -> None:
    training = training_on(tmp_path, 30)
    with pytest.raises(UserError, match=r"has 30 rows of gemm; to choose 50 shots .* takes at least 100"):
        next(leave_out(training, training.measured[0], [0, 50], 1))
