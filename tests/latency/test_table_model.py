"""Trained for a moment on tables that follow a rule."""

import os

import numpy as np
import pytest

from cosearch.core.errors import UserError
from cosearch.latency import SHIPPED, pretrained
from cosearch.latency.error_card import leave_out
from cosearch.latency.table_model import Training
from cosearch.latency.tables import GPUChip, Operations, describe, read
from tests.latency.tables import write

STEPS = 300


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    write(folder, rows=800)
    measured = read([folder], "gemm")
    return Training(measured, {one.chip.name: one.chip.generation for one in measured}, [10], steps=STEPS)


def test_a_chip_of_a_generation_that_was_left_out_is_predicted(training) -> None:
    target = next(one for one in training.measured if one.chip.name == "large")
    before, after = leave_out(training, target, [0, 10], 1)
    roofline = describe(target.operations, target.chip).roofline_s
    assert before["mape"] < np.abs(roofline / target.latency_s - 1).mean()
    assert after["mape"] < before["mape"]
    assert after["tau"] > 0.9
    assert after["coverage"] > 0.8


def test_twins_of_the_target_are_left_out(training) -> None:
    network = training.network({"Hopper"})
    left = [one for one in training.measured if one.chip.generation != "Hopper"]
    assert {one.chip.name for one in left} == {"old", "large", "small"}
    most = max(describe(one.operations, one.chip).features.max() for one in left)
    assert network.bounds.max() == pytest.approx(most)


def test_operations_outside_of_the_tables_are_told(training) -> None:
    model = training.model({"Hopper"})
    chip = next(one.chip for one in training.measured if one.chip.name == "new")
    columns = {"dtype": np.array(["bfloat16"] * 2), "m": np.array([8, 8]), "n": np.array([1024, 2**22])}
    operations = Operations("gemm", columns | {"k": np.array([1024, 1024])})
    near, far = model.network.outside(describe(operations, chip))
    assert near == 0
    assert far > 0.2


def test_saved_models_predict_the_same(training, tmp_path) -> None:
    model = training.model({"Hopper"})
    made = pretrained.Pretrained({"gemm": model}, {"gemm": {"systems": {}, "errors on generations left out": []}})
    pretrained.save(made, tmp_path)
    loaded = pretrained.load(tmp_path)
    one = training.measured[0]
    functions = [own.models["gemm"].function(one.operations, one.chip) for own in (made, loaded)]
    np.testing.assert_array_equal(functions[0].mean, functions[1].mean)
    assert loaded.models["gemm"].prior == model.prior
    assert loaded.name == made.name


def test_damaged_and_foreign_models_are_refused(training, tmp_path) -> None:
    with pytest.raises(UserError, match="has no models of operations"):
        pretrained.load(tmp_path)
    (tmp_path / "operations_gpu.json").write_text('{"version": 0}')
    with pytest.raises(UserError, match="version 0; this cosearch reads"):
        pretrained.load(tmp_path)


def test_models_are_replaced_together_or_not_at_all(training, tmp_path, monkeypatch) -> None:
    first = pretrained.Pretrained({"gemm": training.model({"Hopper"})}, {"gemm": {}})
    pretrained.save(first, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 2
    second = pretrained.Pretrained({"gemm": training.model({"Ampere"})}, {"gemm": {}})
    synced, fsync = [], os.fsync

    def full(handle: int) -> None:
        synced.append(handle)
        if len(synced) > 1:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            pretrained.save(second, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    weights = tmp_path / "operations_gpu.safetensors"
    pretrained.save(second, tmp_path)
    weights.write_bytes(before[weights.name])
    with pytest.raises(UserError, match=r"is not the one that operations_gpu\.json tells"):
        pretrained.load(tmp_path)


def test_tables_of_one_generation_are_not_enough(tmp_path) -> None:
    write(tmp_path, systems=("new", "twin"))
    with pytest.raises(UserError, match="one generation of GPUs, Hopper"):
        pretrained.train([tmp_path], lambda what, part: None)


def test_what_ships_knows_every_kind_and_is_no_faster_than_its_chip() -> None:
    chip = GPUChip.of_specification("h200", 4.8e12, {"bfloat16": 989e12, "fp8": 1979e12}, 9.0)
    made = pretrained.load(SHIPPED)
    assert set(made.models) == {"gemm", "attn_context", "attn_generation"}
    sizes = {"dtype": np.array(["bfloat16"]), "m": np.array([4096]), "n": np.array([8192]), "k": np.array([8192])}
    seconds = float(np.exp(made.models["gemm"].function(Operations("gemm", sizes), chip).mean[0]))
    least = 2 * 4096 * 8192 * 8192 / chip.flops_per_s["bfloat16"]
    assert least < seconds < 3 * least
    for card in made.card.values():
        assert card["errors on generations left out"], "models ship with how wrong they are"
