"""Where the project's data files lie, in a checkout and in an installed wheel, and where results are cached."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_IN_WHEEL = (_PACKAGE / "_conf").is_dir()

CONF = _PACKAGE / "_conf" if _IN_WHEEL else _PACKAGE.parent / "conf"
SEARCH_SPACES = _PACKAGE / "_search_spaces" if _IN_WHEEL else _PACKAGE.parent / "search_spaces"


def cache_dir() -> Path:
    """Trained weights and measured peaks, shared by all runs: `$COSEARCH_CACHE`, or the user's cache folder."""
    own = os.environ.get("COSEARCH_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(base) if base else Path.home() / ".cache") / "cosearch"
