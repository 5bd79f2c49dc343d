"""Kernels are compiled where they run, once for their content, and refused in words where they cannot be."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosearch import axes
from cosearch.core.errors import Rejected
from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS
from cosearch.kernels.cpu import build
from cosearch.kernels.cpu.program import Kernel, load
from tests import tiny


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that kernels are kept in, still empty, and nothing known of earlier calls."""
    monkeypatch.setenv("COSEARCH_CACHE", str(tmp_path))
    known = (build._load, build.compiler, build.version, build.state, build.why_unavailable, load)
    for one in known:
        one.cache_clear()
    yield tmp_path / "kernels"
    for one in known:
        one.cache_clear()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one source, which is compiled in no time."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "tiny.cc").write_text('extern "C" int number() { return NUMBER; }\n')
    monkeypatch.setattr(build, "_SOURCES", folder)
    return folder


@pytest.fixture
def without_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CXX", "/nonexistent")
    return fresh


def libraries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.compiler
def test_a_kernel_is_compiled_once(fresh: Path, sources: Path, monkeypatch: pytest.MonkeyPatch):
    assert build.load("tiny.cc", {"NUMBER": 7}, ("avx2",)).number() == 7
    (name,) = libraries(fresh)
    assert name.startswith("tiny-") and name.endswith(".so")

    def compile_again(arguments: list[str]) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(build, "_compile", compile_again)
    build.load("tiny.cc", {"NUMBER": 7}, ("avx2",))
    build._load.cache_clear()  # as another process
    assert build.load("tiny.cc", {"NUMBER": 7}, ("avx2",)).number() == 7
    assert libraries(fresh) == [name]


@pytest.mark.compiler
def test_whatever_goes_into_a_kernel_makes_another(fresh: Path, sources: Path, monkeypatch: pytest.MonkeyPatch):
    def number(value: int = 1, isa: tuple[str, ...] = ("avx2",)) -> int:
        build._load.cache_clear()
        return build.load("tiny.cc", {"NUMBER": value}, isa).number()

    assert (number(1), number(2), len(libraries(fresh))) == (1, 2, 2)
    if len(build.instructions()) > 1:
        number(2, build.instructions()[:2])
    before = len(libraries(fresh))
    (sources / "tiny.h").write_text("// which the source might include")
    build.state.cache_clear()
    assert (number(), len(libraries(fresh))) == (1, before + 1)
    (sources / "tiny.cc").write_text('extern "C" int number() { return -NUMBER; }\n')
    build.state.cache_clear()
    assert (number(), len(libraries(fresh))) == (-1, before + 2)
    monkeypatch.setattr(build, "version", lambda: "another compiler")
    assert (number(), len(libraries(fresh))) == (-1, before + 3)
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O0"))
    assert (number(), len(libraries(fresh))) == (-1, before + 4)


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("source", "macros", "words"),
    [
        ("matmul.cc", {}, "FORMAT"),
        ("attend.cc", {"FORMAT": "int5"}, "int5"),
        ("nothing.cc", {}, "No such file|no such file"),
    ],
)
def test_what_does_not_compile_is_rejected_in_the_compilers_words(
    fresh: Path, source: str, macros: dict[str, str | int], words: str
):
    with pytest.raises(Rejected, match=rf"does not compile a native kernel: .*({words})"):
        build.load(source, macros, build.instructions())
    assert libraries(fresh) == []


@pytest.mark.compiler
def test_a_broken_source_is_rejected(fresh: Path, sources: Path):
    (sources / "tiny.cc").write_text("int this is none;")
    with pytest.raises(Rejected, match=r"does not compile a native kernel: .*tiny\.cc"):
        build.load("tiny.cc", {}, ("avx2",))


@pytest.mark.compiler
def test_no_kernel_runs_on_instructions_that_the_processor_lacks(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    made = Kernel("combine", (), ("avx2", "avx512", "avx1024"))
    with pytest.raises(Rejected, match="made for avx1024, which this processor does not have"):
        load(made)
    monkeypatch.setattr(build, "instructions", lambda: ("avx2",))
    with pytest.raises(Rejected, match="made for avx512, avx1024"):
        load(made)


@pytest.mark.compiler
def test_a_place_that_keeps_nothing_is_told(fresh: Path):
    fresh.write_text("in the way")
    with pytest.raises(Rejected, match=f"cannot be kept in {fresh}"):
        build.load("combine.cc", {}, ("avx2",))


def test_a_compiler_that_never_ends_is_rejected(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] && echo slow 1 && exit\nexec sleep 60\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(build, "_LIMIT_S", 0.2)
    monkeypatch.setattr(build, "instructions", lambda: ("avx2",))
    with pytest.raises(Rejected, match=r"slow did not compile a native kernel in 0.2 s"):
        build.load("combine.cc", {}, ("avx2",))


def test_without_a_compiler_everything_says_why(without_compiler: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "instructions", lambda: ("avx2",))
    why = "there is no C"
    for kernel in (MATMUL_KERNELS["cpp"], ATTENTION_KERNELS["cpp"]):
        assert why in str(kernel.why_unavailable())
    with pytest.raises(Rejected, match=why):
        load(Kernel("combine"))
    assert not without_compiler.exists()


@pytest.mark.compiler
def test_a_compiler_that_refuses_the_kernels_says_why(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    """As one that is older than the processor does."""
    monkeypatch.setitem(build.INSTRUCTIONS, "avx2", ("avx2", "of_tomorrow"))  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(build, "instructions", lambda: ("avx2",))
    assert "-mof_tomorrow" in str(MATMUL_KERNELS["cpp"].why_unavailable())


@pytest.mark.compiler
def test_the_compiler_may_be_a_command(fresh: Path, sources: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "env NOTHING=1 g++")
    assert build.load("tiny.cc", {"NUMBER": 7}, ("avx2",)).number() == 7


@pytest.mark.compiler
def test_what_a_killed_compilation_left_is_removed(fresh: Path, sources: Path):
    old, new = fresh / f"{build._DRAFT}old", fresh / f"{build._DRAFT}new"
    old.mkdir(parents=True)
    new.mkdir()
    os.utime(old, (0, 0))
    build.load("tiny.cc", {"NUMBER": 7}, ("avx2",))
    assert not old.exists() and new.exists()


def test_an_old_processor_says_why(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "instructions", lambda: ())
    assert build.why_unavailable() == "the processor has no AVX2"


def test_without_a_compiler_a_space_goes_on_with_the_lowerings_of_xla(without_compiler: Path):
    space = axes.load_space("llm_decode", target="cpu")
    point = space.reference.point
    for knob in ("schedule.matmul", "schedule.attention"):
        changed = space.canonical({**point, "schedule.weight_layout": "out_in", knob: "cpp"})
        why = space.why_invalid(changed)
        assert why is not None and "rule 'cpu runs it'" in why
        assert "the kernel 'cpp' is not to be had: there is no C++ compiler" in why
    rng = random.Random(0)
    drawn = [space.sample(rng) for _ in range(40)]
    assert {one.schedule[knob] for one in drawn for knob in ("matmul", "attention")} == {"dot", "multiply_reduce"}


TOGETHER = """
import sys
from pathlib import Path
from cosearch.kernels.cpu import build
build._SOURCES = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
assert build.load("tiny.cc", {"NUMBER": 7}, ("avx2",)).number() == 7
"""


@pytest.mark.compiler
def test_two_processes_at_once_both_get_it(fresh: Path, sources: Path):
    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT)}
    command = [sys.executable, "-c", TOGETHER, str(sources)]
    both = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert len(libraries(fresh)) == 1
