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
from cosearch.paths import cache_dir

GROUPS = {"int4_g32": 32, "int4_g64": 64, "int4_g128": 128, "mxfp4": 32, "nvfp4": 16}
"""Formats of 4 bits to the rows of a group."""
_MOST_FEW = 2
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
    ahead_bytes: int = 0
    chunks: int = 4


def few(product: Product) -> bool:
    """Whether rows are used as they are read, in one stream, and not opened for many tokens (`MOST_FEW` of
    `native/matmul.cc`)."""
    return product.tokens <= _MOST_FEW and (product.format not in GROUPS or "avx512" in build.instructions())


def choices(product: Product) -> Iterator[Tiles]:
    """All tiles that differ for a product; those of `shipped` are among them."""
    start = shipped(product)
    if few(product):
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
    if few(product):
        # What a processor asks for by itself is best, but where it computes for long between two lines of memory.
        return Tiles(chunks=1, ahead_bytes=4096 if product.format in GROUPS else 0)
    # A sum of the weights goes with every row of int8, and takes a register from the tile.
    return Tiles(rows=2, tokens=8) if product.format == "int8" and product.inputs == "int8" else Tiles()


def tiles_for(product: Product) -> Tiles:
    """The tiles to take for a product: measured ones where there are any."""
    return _measured(product) or shipped(product)


def is_tuned(product: Product) -> bool:
    """Whether tiles were measured for a product."""
    return _measured(product) is not None


def keep(product: Product, tiles: Tiles) -> None:
    """Take these tiles for a product from now on."""
    path = _path(product)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"product": asdict(product), "made_for": _machine(), "tiles": asdict(tiles)})


def _measured(product: Product) -> Tiles | None:
    try:
        kept = json.loads(_path(product).read_text())["tiles"]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # none there, or none that this version can read: the shipped ones are right, too
    return next((tiles for tiles in choices(product) if asdict(tiles) == kept), None)


def _path(product: Product) -> Path:
    return cache_dir() / "kernels" / "tiles" / f"{content_hash([asdict(product), _machine()])}.json"


@functools.cache
def _machine() -> dict[str, object]:
    return {
        "processor": build.processor(),
        "instructions": list(build.instructions()),
        "compiler": build.version(),
        "threads": build.threads(),
    }
