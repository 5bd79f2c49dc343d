"""Which tiles a product gets: shipped ones, or those that were measured for it on this machine."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cosearch.kernels import Product
from cosearch.kernels.cpu import build, tiles
from cosearch.kernels.cpu.operations import WEIGHTS
from cosearch.kernels.cpu.tiles import Tiles, choices, is_tuned, keep, shipped, tiles_for

PRODUCT = Product(1, 512, 512, "int8", "out_in")
PRODUCTS = [
    Product(tokens, 512, 512, form, "out_in", inputs)
    for tokens in (1, 2, 3, 64)
    for form in WEIGHTS
    for inputs in (("as_is", "int8") if form in ("int8", "int4_g32") else ("as_is",))
]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that tiles are kept in; nothing is in it."""
    monkeypatch.setenv("COSEARCH_CACHE", str(tmp_path))
    tiles._machine.cache_clear()
    yield tmp_path / "kernels" / "tiles"
    monkeypatch.undo()
    tiles._machine.cache_clear()


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_choices_are_all_different_and_have_what_is_shipped(product: Product):
    found = list(choices(product))
    assert len(set(found)) == len(found) > 20
    assert shipped(product) in found


def test_what_was_measured_is_taken_and_nothing_else(kept: Path):
    assert not is_tuned(PRODUCT) and tiles_for(PRODUCT) == shipped(PRODUCT)
    other = next(one for one in choices(PRODUCT) if one != shipped(PRODUCT))
    keep(PRODUCT, other)
    assert is_tuned(PRODUCT) and tiles_for(PRODUCT) == other
    for unlike in (replace(PRODUCT, tokens=2), replace(PRODUCT, format="bfloat16"), replace(PRODUCT, inputs="int8")):
        assert not is_tuned(unlike) and tiles_for(unlike) == shipped(unlike)
    keep(PRODUCT, shipped(PRODUCT))
    assert is_tuned(PRODUCT) and tiles_for(PRODUCT) == shipped(PRODUCT)
    assert len(list(kept.iterdir())) == 1


@pytest.mark.parametrize("name", ["processor", "instructions", "version", "threads"])
def test_another_machine_measures_for_itself(kept: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    keep(PRODUCT, shipped(PRODUCT))
    monkeypatch.setattr(build, name, lambda: ("another",))
    tiles._machine.cache_clear()
    assert not is_tuned(PRODUCT)
    keep(PRODUCT, shipped(PRODUCT))
    made_for = [json.loads(path.read_text())["made_for"] for path in kept.iterdir()]
    assert len(made_for) == 2 and made_for[0] != made_for[1]


GARBAGE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"tiles": null}',
    b'{"tiles": {}}',
    b'{"tiles": {"rows": 4}}',
    json.dumps({"tiles": {**asdict(Tiles()), "more": 1}}).encode(),
    json.dumps({"tiles": {**asdict(Tiles()), "rows": "4; int x"}}).encode(),
    json.dumps({"tiles": {**asdict(Tiles()), "rows": 10**6}}).encode(),
    json.dumps({"tiles": {**asdict(Tiles()), "chunks": 0}}).encode(),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda one: one.decode(errors="replace")[:40] or "empty")
def test_what_is_no_choice_counts_as_not_measured(kept: Path, garbage: bytes):
    other = next(one for one in choices(PRODUCT) if one != shipped(PRODUCT))
    keep(PRODUCT, other)
    (path,) = kept.iterdir()
    path.write_bytes(garbage)
    assert not is_tuned(PRODUCT) and tiles_for(PRODUCT) == shipped(PRODUCT)
    keep(PRODUCT, other)
    assert is_tuned(PRODUCT) and tiles_for(PRODUCT) == other


def test_without_a_compiler_there_are_still_tiles(kept: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "version", lambda: "")
    assert tiles_for(PRODUCT) == shipped(PRODUCT)
