"""A cache and tiny inputs that all tests share, so that each architecture is trained once; W&B stays offline."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosearch.kernels.cpu import build
from cosearch.kernels.cpu.program import load
from tests import tiny


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is marked `compiler` where no C++ kernel can be compiled and run."""
    if _why_no_kernels() is not None:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("compiler")])
        items[:] = [item for item in items if not item.get_closest_marker("compiler")]


def pytest_report_header() -> str | None:
    """Say so."""
    why = _why_no_kernels()
    return None if why is None else f"tests marked 'compiler' are deselected: {why}"


def _why_no_kernels() -> str | None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COSEARCH_CACHE", folder)  # not the user's own
        return build.why_unavailable()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`$COSEARCH_CACHE` of this session."""
    folder = tmp_path_factory.mktemp("cache")
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Kernels are kept by their content: what one worker has compiled serves all.
        shared = tmp_path_factory.getbasetemp().parent / "kernels"
        shared.mkdir(exist_ok=True)
        (folder / "kernels").symlink_to(shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COSEARCH_CACHE", str(folder))
        patch.setenv("WANDB_MODE", "offline")
        yield folder


@pytest.fixture(scope="module")
def quick_kernels() -> Iterator[None]:
    """C++ kernels that are compiled with fewer optimisations, in half the time; the contracts' are as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in build._FLAGS))
        _forget_kernels()
        yield
    _forget_kernels()


def _forget_kernels() -> None:
    build._load.cache_clear()
    load.cache_clear()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`space.yaml` and `text/` (`tests/tiny.py`)."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search; to be read, or copied by `run_copy`."""
    output = tmp_path_factory.mktemp("runs")
    code, _, err = tiny.command(*tiny.overrides(inputs, output))
    assert code == 0, err
    (folder,) = (output / "llm_decode").iterdir()
    return folder


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished search, to be changed."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    return folder


@pytest.fixture(scope="session")
def artifact(finished: Path) -> Path:
    """An artifact; to be read, or copied."""
    return next(path for path in sorted((finished / "artifacts").iterdir()) if path.is_dir())


@pytest.fixture
def artifact_copy(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact, to be changed."""
    folder = tmp_path / "artifact"
    shutil.copytree(artifact, folder, copy_function=shutil.copyfile)
    for path in folder.iterdir():
        os.chmod(path, 0o644)
    return folder
