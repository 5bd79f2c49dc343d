"""Everything that is registered keeps its contract; a new file is tested by being there."""

from pathlib import Path
from typing import Any

import jax
import pytest

from cosearch import testing
from cosearch.architecture.attention import ATTENTION
from cosearch.architecture.feedforward import FEEDFORWARD
from cosearch.export import STACKS
from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS
from cosearch.measure.process import Worker
from cosearch.precision import FORMATS
from cosearch.proposers import PROPOSERS
from cosearch.report import TRACKERS
from cosearch.sparsity import PATTERNS
from cosearch.targets import TARGETS

PEAKS = {
    "platform": "cpu",
    "kind": "cpu",
    "bandwidth_bytes_per_s": 1.5e10,
    "peak_flops_per_s": {"float32": 1e11, "bfloat16": 3e10, "int8": 4e10},
    "overhead_s": 2e-7,
}


@pytest.mark.parametrize("name", ATTENTION.names())
def test_attention(name: str):
    testing.check_attention(name)


@pytest.mark.parametrize("name", FEEDFORWARD.names())
def test_feedforward(name: str):
    testing.check_feedforward(name)


@pytest.mark.parametrize("name", FORMATS.names())
def test_format(name: str):
    testing.check_format(name)


def kernels_of(registry: Any) -> list[Any]:
    """The kernels, of which those for other devices, and those that cannot be had, are deselected by name."""

    def mark(name: str) -> Any:
        if name == "cpp":
            return pytest.mark.compiler
        kernel = registry[name]
        there = jax.devices()[0].platform in kernel.platforms and kernel.why_unavailable() is None
        return () if there else pytest.mark.absent

    return [pytest.param(name, marks=mark(name)) for name in registry.names()]


@pytest.mark.parametrize("name", kernels_of(MATMUL_KERNELS))
def test_matmul_kernel(name: str):
    testing.check_matmul_kernel(name)


@pytest.mark.parametrize("name", kernels_of(ATTENTION_KERNELS))
def test_attention_kernel(name: str):
    testing.check_attention_kernel(name)


@pytest.mark.parametrize("name", PATTERNS.names())
def test_pattern(name: str):
    testing.check_pattern(name)


@pytest.mark.parametrize("name", PROPOSERS.names())
def test_proposer(name: str):
    testing.check_proposer(name)


@pytest.mark.parametrize("name", TRACKERS.names())
def test_tracker(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for variable in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for variable in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    testing.check_tracker(name, tmp_path / "runs")


@pytest.mark.parametrize("name", STACKS.names())
def test_stack(name: str):
    testing.check_stack(name)


@pytest.mark.parametrize("name", TARGETS.names())
def test_target(name: str, tmp_path: Path):
    testing.check_target(name, tmp_path, lambda: PEAKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS.names())
def test_target_with_the_peaks_of_this_machine(name: str, tmp_path: Path):
    with Worker() as worker:

        def measure() -> dict[str, Any]:
            return worker.call("peaks", {}, 120.0)

        testing.check_target(name, tmp_path, measure)
