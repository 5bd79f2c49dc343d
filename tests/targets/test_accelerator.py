"""What is known of chips without having them; what they are compiled to is in `test_absent.py`."""

from dataclasses import replace
from pathlib import Path

import pytest

from cosearch.__main__ import main
from cosearch.core.errors import UserError
from cosearch.measure.process import Worker
from cosearch.targets import TARGETS, accelerator, gpu, tpu
from cosearch.targets.accelerator import ENVIRONMENT, Accelerator
from cosearch.targets.gpu import GPU
from cosearch.targets.tpu import TPU
from cosearch.targets.workplace import Workplace
from tests import tiny

CHIPS = [name for name in TARGETS if isinstance(TARGETS[name], Accelerator)]


def test_the_chips_that_are_asked_for_most_are_there():
    assert set(CHIPS) >= {"a100", "h100", "h200", "b200", "l40s", "rtx_pro_6000"}
    assert set(CHIPS) >= {"tpu_v4", "tpu_v5e", "tpu_v5p", "tpu_v6e"}


def test_a_device_is_of_one_chip():
    kinds = [accelerator.accelerator(name).kind for name in CHIPS]
    assert len(set(kinds)) == len(kinds)


def test_no_cpu_is_an_accelerator():
    with pytest.raises(UserError, match="the target 'cpu' is no GPU or TPU"):
        accelerator.accelerator("cpu")


@pytest.mark.parametrize(
    ("chip", "runs"), [("a100", False), ("h100", True), ("l40s", True), ("b200", True), ("tpu_v5e", False)]
)
def test_float8_is_multiplied_where_the_datasheet_has_it(chip: str, runs: bool):
    why = TARGETS[chip].why_no_value("precision.matmul_inputs", "float8_e4m3")
    assert (why is None) == runs
    assert TARGETS[chip].why_no_value("precision.matmul_inputs", "int8") is None
    assert TARGETS[chip].why_no_value("precision.matmul_inputs", "as_is") is None


def test_knobs_of_tpus_are_left_to_tpus():
    for chip in TARGETS:
        found = [TARGETS[chip].why_no_value(f"schedule.{k}", v) for k, v in (("boundary", "compiler"), ("steps", 4))]
        assert (found[0] is None) == chip.startswith("tpu") and found[1] is None


def test_xla_is_told_of_a_gpu_by_its_literal():
    chip = TARGETS["h100"]
    assert isinstance(chip, GPU)
    for words in ("core_count: 132", "major: 9 minor: 0", "memory_bandwidth: 3350000000000", "NVIDIA H100 80GB HBM3"):
        assert words in chip.description


def test_a_gpu_of_another_compute_capability_is_described_or_refused():
    chip = TARGETS["l40s"]
    assert isinstance(chip, GPU)
    assert "threads_per_core_limit: 1536" in replace(chip, capability=(8, 6)).description
    with pytest.raises(UserError, match=r"target l40s: nothing is known here of compute capability 3\.5\. Known: 8\.0"):
        replace(chip, capability=(3, 5))


@pytest.mark.parametrize(
    ("chip", "module", "message"),
    [
        ("tpu_v5e", tpu, "libtpu, which is not installed: pip install 'cosearch[tpu]'"),
        ("h100", gpu, "JAX's plugin for CUDA, which is not installed: pip install 'cosearch[cuda13]'"),
    ],
)
def test_what_is_missing_is_said_in_one_line(chip: str, module: object, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        Workplace.of(chip)
    assert str(caught.value) == f"target={chip}: compiling for it takes {message}"


def test_a_plugin_that_is_missing_ends_a_search_before_it_has_a_folder(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(tpu, "find_spec", lambda name: None)
    assert main(tiny.overrides(inputs, tmp_path / "runs", "target=tpu_v5e")) == 2
    assert "target=tpu_v5e: compiling for it takes libtpu" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_chip_of_the_kind_that_is_attached_is_worked_on_itself(monkeypatch: pytest.MonkeyPatch):
    with Worker(TARGETS["cpu"].environment) as worker:
        here = worker.call("device", {}, 120)["kind"]
    monkeypatch.setattr(TPU, "why_unavailable", lambda self: None)
    monkeypatch.setitem(TARGETS._entries, "mine", replace(accelerator.accelerator("tpu_v5e"), kind=here))
    found = Workplace.of("mine")
    assert found.attached and "JAX_PLATFORMS" not in found.environment
    assert found.target(Path(), dict).attached
    far = Workplace.of("tpu_v6e")
    assert not far.attached and far.environment == ENVIRONMENT
    assert not far.target(Path(), dict).attached
    assert Workplace.of("cpu").attached
