"""The tunable parameters of products, and what is known to be good for a product."""

from dataclasses import dataclass

from cosearch.kernels import Product


@dataclass(frozen=True)
class Tiles:
    """`rows` by `tokens` sums stay in registers where there are many tokens, for which `panel_bytes` of rows are opened
    at a time; what is read is asked for `ahead_bytes` before; the product is cut into `chunks` for each thread."""

    rows: int = 4
    tokens: int = 6
    panel_bytes: int = 262144
    ahead_bytes: int = 2048
    chunks: int = 4


def tiles_for(product: Product) -> Tiles:
    """The tiles to take for a product."""
    return Tiles()
