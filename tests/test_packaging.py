"""What the wheel and the source archive carry, and that the constraints pin what the project asks for."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
FOLDERS = {"cosearch": "cosearch", "conf": "cosearch/_conf", "search_spaces": "cosearch/_search_spaces"}
"""Folder of the checkout to its place in the wheel."""


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a `wheel` or an `sdist` of `source` without installing anything and without a network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", CHECKOUT, tmp_path_factory.mktemp("wheel"))


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def project_files() -> Iterator[str]:
    """Where each file of the project's folders must be in the wheel; what git does not track may be left out."""
    for folder, place in FOLDERS.items():
        for file in (CHECKOUT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith("."):
                yield f"{place}/{file.relative_to(CHECKOUT / folder).as_posix()}"


def test_the_wheel_carries_the_package_its_configuration_and_its_spaces_and_nothing_else(wheel: Path):
    assert names(wheel) == set(project_files())
    for place in FOLDERS.values():
        assert any(name.startswith(f"{place}/") for name in names(wheel)), f"nothing in {place}"


def test_the_installed_package_reads_its_own_configuration(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "from cosearch import paths; print(paths.CONF); print(paths.SEARCH_SPACES)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    conf, spaces = map(Path, result.stdout.splitlines())
    package = tmp_path.resolve() / "cosearch"
    assert (conf, spaces) == (package / "_conf", package / "_search_spaces")
    assert any(conf.rglob("*.yaml"))
    assert any(spaces.glob("*.yaml"))


def test_the_wheel_says_what_it_needs_and_under_which_licence(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        read = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(read["METADATA"])
    assert metadata["Name"] == "cosearch"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert SpecifierSet(metadata["Requires-Python"]) == SpecifierSet(">=3.11")
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert "Apache License" in read["LICENSE"]
    assert "cosearch = cosearch.__main__:main" in read["entry_points.txt"]


def test_a_wheel_from_the_source_archive_is_the_same(wheel: Path, tmp_path: Path):
    sdist = build("sdist", CHECKOUT, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.name.startswith("cosearch-"))
    assert names(build("wheel", source, tmp_path / "wheel")) == names(wheel)
    assert (source / "constraints.txt").is_file()
    assert (source / "tests" / "test_packaging.py").is_file()


LINE = re.compile(r'(?P<name>[a-z0-9]+(-[a-z0-9]+)*)==(?P<version>[0-9][0-9a-z.]*)( ; python_version (<|>=) "3\.\d+")?')


def constraints(python: str) -> dict[str, str]:
    """Name to version of the constraints that hold for a version of Python."""
    found: dict[str, str] = {}
    for line in (CHECKOUT / "constraints.txt").read_text().splitlines():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            assert requirement.name not in found, f"{requirement.name} has two versions for Python {python}"
            found[requirement.name] = str(requirement.specifier).removeprefix("==")
    return found


def test_constraints_are_names_and_versions_only():
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    pinned = [line.partition("==")[0] for line in lines]
    assert pinned == sorted(pinned)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_dependency_is_pinned_to_a_version_that_the_project_allows(python: str):
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["dev"], *extras["export"], *extras["browser"]]
    pinned = constraints(python)
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    assert all(set(constraints(other)) == set(pinned) for other in ("3.11", "3.13"))
