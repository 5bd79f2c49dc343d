"""Chips that are not there: models compile for each, and a search for one ends with predictions and artifacts that
generate here; `scripts/test_chips` installs what that takes."""

import json
import shutil
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import pytest

from cosearch.architecture.decoder import Decoder
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices
from cosearch.core.errors import Rejected
from cosearch.latency.hlo import HloFeatures, Module
from cosearch.measure.bench import memory_bytes
from cosearch.precision import Precision
from cosearch.schedule import Schedule
from cosearch.schedule.program import Program
from cosearch.targets import TARGETS
from cosearch.targets.accelerator import Accelerator, accelerator
from tests import tiny

pytestmark = pytest.mark.chips

CHIPS = [name for name in TARGETS if isinstance(TARGETS[name], Accelerator)]


def step(chip: str, options: Mapping[str, Any] | None = None, **schedule: Any) -> tuple[Program, jax.stages.Compiled]:
    """A decode step of a small decoder."""
    shape = DecoderShape.of(Choices({"width": 256, "depth": 3, "attention": "mha", "ffn_ratio": 3}))
    program = Program(Decoder(shape, Precision(), Schedule(**schedule)), "decode", batch=1, capacity=512)
    return program, program.compile(options or {}, (), accelerator(chip).compile)


def features(chip: str, options: Mapping[str, Any] | None = None, **schedule: Any) -> HloFeatures:
    """Of that."""
    program, compiled = step(chip, options, **schedule)
    read = sum(one.size * one.dtype.itemsize for one in (*program.params.values(), *program.cache))
    found = HloFeatures.of(compiled, program.cache)
    assert found.moved_bytes > 0.5 * read, "it reads its weights and its cache, or what the loop has of them"
    return found


@pytest.mark.parametrize("chip", CHIPS)
def test_a_decode_step_compiles(chip: str) -> None:
    assert accelerator(chip).why_unavailable() is None
    found = features(chip, layers="unroll")
    assert 20 < found.launches < 400
    assert found.fusions > 0.3 * found.launches
    assert (found.estimated_cycles > 0) == chip.startswith("tpu")


@pytest.mark.parametrize("chip", ["tpu_v5e", "h100"])
def test_a_loop_over_the_layers_runs_as_often_as_there_are_layers(chip: str) -> None:
    looped, unrolled = features(chip, layers="scan"), features(chip, layers="unroll")
    assert 0.5 < looped.launches / unrolled.launches < 2


@pytest.mark.parametrize("boundary", ["default", "compiler"])
@pytest.mark.parametrize("chip", ["tpu_v5e", "h100"])
def test_memory_counts_inputs_as_they_lie_on_the_chip(chip: str, boundary: str) -> None:
    program, compiled = step(chip, boundary=boundary)
    plain = sum(one.size * one.dtype.itemsize for one in program.arguments())
    module, account = Module(compiled.as_text() or ""), compiled.memory_analysis()
    assert account is not None
    given = [one for one in module.computations[module.entry].values() if one.opcode == "parameter"]
    in_tiles = sum(shape.bytes for one in given for shape in one.shapes)
    assert in_tiles == plain if chip == "h100" else in_tiles > plain
    beside = memory_bytes(compiled) - in_tiles - account.temp_size_in_bytes - account.generated_code_size_in_bytes
    assert 256 * 4 <= beside < 4096, "logits, tokens and a table"


def test_energy_is_predicted_where_the_power_is_known_and_else_refused(inputs: Path, tmp_path: Path) -> None:
    more = ("objectives=[minimize latency_s,minimize energy_j]", "trackers=[console]", "budget.trials=1")
    code, _, err = tiny.command(*tiny.overrides(inputs, tmp_path / "none", "target=tpu_v5e", *more), timeout_s=600)
    assert code == 2 and "energy_j can be neither measured nor predicted for target=tpu_v5e: no tpu_v5e is " in err
    assert not (tmp_path / "none").exists()
    code, out, err = tiny.command(*tiny.overrides(inputs, tmp_path / "runs", "target=h100", *more), timeout_s=600)
    assert code == 0 and "energy predicted " in out, err
    (folder,) = (tmp_path / "runs" / "llm_decode").iterdir()
    (point,) = json.loads((folder / "pareto.json").read_text())["points"]
    latency, energy = point["metrics"]["latency_s"], point["metrics"]["energy_j"]
    assert energy["source"] == "predicted" and energy["interval"][1] <= 700 * latency["interval"][1]


@pytest.mark.parametrize("chip", ["tpu_v5e", "h100"])
def test_an_unknown_option_is_refused(chip: str) -> None:
    with pytest.raises(Rejected, match=f"does not compile for {chip}: .*xla_nope"):
        features(chip, {"xla_nope": True})


@pytest.mark.parametrize("chip", ["tpu_v5e", "h100"])
def test_a_search_ends_with_predictions_and_artifacts_that_generate_here(
    chip: str, inputs: Path, tmp_path: Path
) -> None:
    arguments = tiny.overrides(inputs, tmp_path, f"target={chip}", "trackers=[console,html]", "budget.trials=3")
    code, out, err = tiny.command(*arguments, timeout_s=600)
    assert code == 0, err
    assert f"{chip} is not attached" in out and "latency predicted" in out
    (folder,) = (tmp_path / "llm_decode").iterdir()
    told = json.loads((folder / "pareto.json").read_text())
    assert told["problem"]["target"]["attached"] is False
    assert told["points"] and told["comparison"] is None
    for point in told["points"]:
        latency = point["metrics"]["latency_s"]
        assert latency["source"] == "predicted" and latency["interval"][0] < latency["value"] < latency["interval"][1]
        assert "numerical_error" not in point["metrics"], "nothing was verified on the chip"
        assert point["metrics"]["portable_error"]["value"] <= 1
        assert not point["confirmed"]
        artifact = folder / point["artifact"]
        manifest = json.loads((artifact / "manifest.json").read_text())
        assert manifest["problem"]["target"]["name"] == chip and not manifest["ran_there"]
        assert "never ran" in json.loads((artifact / "verification.json").read_text())["of"]
        code, out, err = tiny.command("generate", f"artifact={artifact}", "prompt=def main(", "tokens=8")
        assert code == 0 and out.startswith("def main("), err
        assert "compiled again from the StableHLO" in err
    assert "predicted" in (folder / "report.html").read_text()
    resumed = shutil.copytree(folder, tmp_path / "resumed")
    code, out, err = tiny.command("resume", f"run={resumed}", timeout_s=600)
    assert code == 0, err
    with sqlite3.connect(resumed / "trials.db") as archive:
        archive.execute("UPDATE trials SET trial = replace(trial, 'roofline 2', 'roofline 1')")
    archive.close()
    code, out, err = tiny.command("resume", f"run={resumed}", timeout_s=600)
    assert code == 2 and f"run={resumed}: its latency_s was predicted by: roofline 1" in err
    config = resumed / "config.yaml"
    config.write_text(config.read_text().replace("attached: false", "attached: true"))
    code, out, err = tiny.command("resume", f"run={resumed}", timeout_s=600)
    assert code == 2 and f"its figures are measured; here {chip} is not attached" in err
