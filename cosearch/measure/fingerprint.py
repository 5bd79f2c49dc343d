"""Under what a figure was measured: versions, chip and commit. Every trial and artifact carries it."""

import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cosearch.kernels.cpu import build

_PACKAGES = ("cosearch", "jax", "jaxlib", "flax", "optax", "numpy", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


@functools.cache
def fingerprint() -> dict[str, Any]:
    """Versions, processor and commit; the same for a process and all its workers."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "processor": build.processor(),
        "cores": os.cpu_count(),
        "threads": build.threads(),
        "compiler": build.version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    told = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return told.stdout.strip() or None
