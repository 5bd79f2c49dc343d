"""The tunable parameters of products, and which are known to be good: shipped ones, and those that were measured here.

Measured ones (`cosearch/measure/tune.py`) are kept in the cache folder, one file for each product, by the processor,
its instructions, the compiler and the number of threads.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cosearch.core.candidate import content_hash
from cosearch.core.files import write_json
from cosearch.kernels import Product
from cosearch.kernels.cpu import build
from cosearch.measure.fingerprint import processor
from cosearch.paths import cache_dir

_MOST_FEW = 2
"""Up to so many tokens, rows are read as one stream and not opened (`native/matmul.cc`)."""
_SHAPES = ((4, 6), (4, 4), (2, 8), (6, 4))
_PANELS = (1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20)
_AHEAD = (0, 512, 1024, 2048, 4096, 8192)
_CHUNKS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Tiles:
    """`rows` by `tokens` sums stay in registers where there are many tokens, for which `panel_bytes` of rows are opened
    at a time; what few tokens read is asked for `ahead_bytes` before; the product is cut into `chunks` for each
    thread."""

    rows: int = 4
    tokens: int = 6
    panel_bytes: int = 1 << 18
    ahead_bytes: int = 2048
    chunks: int = 4


def choices(product: Product) -> Iterator[Tiles]:
    """All tiles that differ for a product; those of `shipped` are among them."""
    start = shipped(product)
    if product.tokens <= _MOST_FEW:
        for ahead in _AHEAD:
            for chunks in _CHUNKS:
                yield replace(start, ahead_bytes=ahead, chunks=chunks)
    else:
        for rows, tokens in _SHAPES:
            for panel in _PANELS:
                for chunks in _CHUNKS:
                    yield replace(start, rows=rows, tokens=tokens, panel_bytes=panel, chunks=chunks)


def shipped(product: Product) -> Tiles:
    """What a product starts from: the best for most of those that were tried on a Zen 4 with 2 threads."""
    if product.tokens <= _MOST_FEW:
        return Tiles(chunks=1)
    # A sum of the weights goes with every row of int8, and takes a register from the tile.
    return Tiles(rows=2, tokens=8) if product.format == "int8" and product.inputs == "int8" else Tiles()


def tiles_for(product: Product) -> Tiles:
    """The tiles to take for a product: measured ones where there are any."""
    return _measured(product, _path(product)) or shipped(product)


def is_tuned(product: Product) -> bool:
    """Whether tiles were measured for a product."""
    return _measured(product, _path(product)) is not None


def keep(product: Product, tiles: Tiles) -> None:
    """Take these tiles for a product from now on."""
    path = _path(product)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"product": asdict(product), "made_for": _machine(), "tiles": asdict(tiles)})
    _measured.cache_clear()


@functools.cache
def _measured(product: Product, path: Path) -> Tiles | None:
    try:
        kept = json.loads(path.read_text())["tiles"]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # none there, or none that this version can read: the shipped ones are right, too
    return next((tiles for tiles in choices(product) if asdict(tiles) == kept), None)


def _path(product: Product) -> Path:
    return cache_dir() / "kernels" / "tiles" / f"{content_hash([asdict(product), _machine()])}.json"


@functools.cache
def _machine() -> dict[str, object]:
    return {
        "processor": processor(),
        "instructions": list(build.instructions()),
        "compiler": build.version(),
        "threads": build.threads(),
    }
