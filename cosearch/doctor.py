"""What this machine can do for a search, and what is missing; each line with what to do about it."""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cosearch.core.errors import Rejected, UserError
from cosearch.kernels.cpu import build
from cosearch.measure.energy import COUNTERS
from cosearch.measure.fingerprint import fingerprint
from cosearch.measure.process import Worker
from cosearch.paths import CONF, SEARCH_SPACES, cache_dir
from cosearch.targets import TARGETS
from cosearch.targets.accelerator import Accelerator

_ENOUGH_BYTES = 3_000_000_000

Finding = tuple[bool | None, str, str]
"""Whether it is well (None: only missed by some uses), what was found, and what to do about it."""


def examine() -> None:
    """Print the findings.

    Raises:
        UserError: something that every search needs is missing.
    """
    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "found", "to do"):
        table.add_column(column, overflow="fold")
    missing = []
    for what, look in _CHECKS.items():
        well, found, advice = look()
        mark = {True: "[green]ok[/]", None: "[yellow]–[/]", False: "[red]missing[/]"}[well]
        table.add_row(mark, what, escape(found), "" if well else escape(advice))
        if well is False:
            missing.append(what)
    Console().print(table)
    if missing:
        raise UserError(f"this machine cannot search yet: {', '.join(missing)}")


def _python() -> Finding:
    return sys.version_info >= (3, 11), platform.python_version(), "install Python 3.11 or newer"


def _packages() -> Finding:
    found = {name: version for name, version in fingerprint().items() if name in ("jax", "jaxlib", "flax", "optax")}
    absent = [name for name, version in found.items() if version is None]
    return not absent, ", ".join(f"{name} {version}" for name, version in found.items()), "run scripts/cosearch once"


def _processor() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return True, f"{build.processor()}, {os.cpu_count()} cores, {memory / 2**30:.0f} GiB", ""


def _worker() -> Finding:
    try:
        with Worker() as worker:
            peaks = worker.call("peaks", {}, 120)
    except (Rejected, UserError) as error:
        return False, str(error), "the worker process must start and run JAX"
    flops = ", ".join(f"{dtype} {value / 1e9:.0f}" for dtype, value in peaks["peak_flops_per_s"].items())
    found = (
        f"{peaks['platform']} ({peaks['kind']}): reads {peaks['bandwidth_bytes_per_s'] / 1e9:.0f} GB/s, GFLOP/s {flops}"
    )
    return True, found, ""


def _accelerator() -> Finding:
    plugins = [name for name in ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu") if _importable(name)]
    advice = "for a GPU or TPU: pip install 'cosearch[cuda12]', [cuda13] or [tpu]"
    return True if plugins else None, ", ".join(plugins) or "none", advice


def _absent() -> Finding:
    chips = {name: chip for name in TARGETS if isinstance(chip := TARGETS[name], Accelerator)}
    why = {name: chip.why_unavailable() for name, chip in chips.items()}
    missing = dict.fromkeys(reason for reason in why.values() if reason)
    able = ", ".join(name for name, reason in why.items() if reason is None)
    return None if missing else True, f"for {able}" if able else "none", f"missing: {'; '.join(missing)}"


def _energy() -> Finding:
    why = {type(counter).__name__: counter.why_unavailable() for counter in COUNTERS.values()}
    able = ", ".join(name for name, reason in why.items() if reason is None)
    missing = "; ".join(f"{name}: {reason}" for name, reason in why.items() if reason)
    return True if able else None, able or "none", missing


def _compiler() -> Finding:
    why = build.why_unavailable()
    return (
        None if why else True,
        why or f"{build.version()}, for {', '.join(build.instructions())}",
        "native kernels need a C++ compiler and AVX2; XLA's own lowerings do without",
    )


def _disk() -> Finding:
    folder = cache_dir()
    while not folder.exists():
        folder = folder.parent
    free = min(shutil.disk_usage(folder).free, shutil.disk_usage(Path.cwd()).free)
    writable = os.access(folder, os.W_OK)
    found = f"{free / 1e9:.1f} GB free, cache in {cache_dir()}" + ("" if writable else " (not writable)")
    return writable and free > _ENOUGH_BYTES, found, "free some, or set COSEARCH_CACHE to another folder"


def _data_files() -> Finding:
    spaces = sorted(path.stem for path in SEARCH_SPACES.glob("*.yaml"))
    experiments = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
    found = f"experiments: {', '.join(experiments)}; spaces: {', '.join(spaces)}"
    return bool(spaces and experiments), found, "install the package again: its configuration is not where it should be"


def _wandb() -> Finding:
    key = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in _text(Path.home() / ".netrc")
    return True if key else None, "logged in" if key else "no key: runs stay offline", "wandb login, to see runs online"


def _importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


_CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": _python,
    "packages": _packages,
    "processor": _processor,
    "JAX device": _worker,
    "accelerators": _accelerator,
    "compiling for absent chips": _absent,
    "energy counters": _energy,
    "C++ compiler": _compiler,
    "disk": _disk,
    "configuration": _data_files,
    "W&B": _wandb,
}
