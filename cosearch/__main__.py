"""The command line: `python -m cosearch [search] experiment=… key=value …`, and the other verbs.

The only file that imports Hydra: it composes `conf/` into plain data and hands that on. Nothing in a config is ever
imported or called; names go through the registries.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cosearch.core.errors import NO_SPACE, Rejected, UserError, first_line
from cosearch.core.registry import did_you_mean
from cosearch.interrupt import Interrupts

USAGE = """python -m cosearch [search] experiment=NAME [key=value …]   search, and write the front's artifacts
python -m cosearch resume run=DIR                               continue a search after any stop
python -m cosearch report run=DIR                               write pareto.json and report.html anew
python -m cosearch generate artifact=DIR prompt=TEXT [tokens=64] [temperature=0] [seed=0]
python -m cosearch space name=SPACE [draws=20000] [seed=0] [target=cpu] [deploy=STACK]   how large a search space is
python -m cosearch calibrate target=CHIP [shots=10] [seed=0]    measure what tells most of a chip at hand, and keep it
python -m cosearch calibrate target=CHIP check=3                whether the calibration still holds
python -m cosearch import_tables path=DIR[,DIR…] [output=DIR]   learn what operations take on GPUs from measured tables
python -m cosearch doctor                                       what this machine can do, and what is missing"""

_INTERRUPTED = 130
_BAD_INPUT = 2
_STOPPED = "\ncosearch: stopped; a search continues with: python -m cosearch resume run=DIR"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0, 2 for bad input, 130 when stopped.

    Without `arguments` it is the process's own program, takes its arguments and handles its interrupts.
    """
    try:
        if arguments is None:
            Interrupts(_INTERRUPTED, _STOPPED)
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        verb = arguments.pop(0) if arguments and "=" not in arguments[0] else "search"
        if verb in ("help", "-h", "--help"):
            print(USAGE)
        elif verb not in VERBS:
            raise UserError(f"unknown verb {verb!r}{did_you_mean(verb, tuple(VERBS))}\n{USAGE}")
        else:
            VERBS[verb](arguments)
    except (UserError, Rejected) as error:  # what was asked for is wrong, or this machine does not do it
        print(f"cosearch: {error}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print(_STOPPED, file=sys.stderr)
        return _INTERRUPTED
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        print(
            f"cosearch: the disk is full: {error.filename or 'no space left'}; free some, then resume", file=sys.stderr
        )
        return _BAD_INPUT
    return 0


def search(overrides: list[str]) -> None:
    """`[search] experiment=NAME key=value …`"""
    config = compose(overrides)
    from cosearch import run

    run.start(config)


def resume(arguments: list[str]) -> None:
    """`resume run=DIR`"""
    options = _options(arguments, {"run": Path})
    from cosearch import run

    run.resume(options["run"])


def report(arguments: list[str]) -> None:
    """`report run=DIR`"""
    options = _options(arguments, {"run": Path})
    from cosearch import run

    run.report(options["run"])


def generate(arguments: list[str]) -> None:
    """`generate artifact=DIR prompt=TEXT tokens=64 temperature=0 seed=0`"""
    defaults = {"tokens": 64, "temperature": 0.0, "seed": 0}
    kinds = {"artifact": Path, "prompt": str, "tokens": int, "temperature": float, "seed": int}
    options = _options(arguments, kinds, defaults)
    # JAX's plugin for CUDA may be here to compile only, without the libraries whose lack it complains of.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # each token waits for the one before, and so does Python
    from cosearch.artifact.generate import generate as continue_text
    from cosearch.artifact.load import load

    artifact = load(options["artifact"])
    if artifact.recompiled:
        print(f"cosearch: compiled again from the StableHLO ({artifact.recompiled})", file=sys.stderr)
    made = continue_text(artifact, options["prompt"], options["tokens"], options["temperature"], options["seed"])
    print(options["prompt"] + made.text)
    print(f"\n{made.tokens} tokens, {made.tokens_per_s:.0f} tokens/s; prompt read in {made.prefill_s * 1e3:.1f} ms")


def space(arguments: list[str]) -> None:
    """`space name=SPACE draws=20000 seed=0 target=cpu deploy=STACK`"""
    defaults = {"draws": 20_000, "seed": 0, "target": "cpu", "deploy": ""}
    kinds = {"name": str, "draws": int, "seed": int, "target": str, "deploy": str}
    options = _options(arguments, kinds, defaults)
    if options["draws"] < 1:
        raise UserError(f"draws={options['draws']}: at least one point must be drawn")
    from cosearch.report.space import describe

    describe(options["name"], options["target"], options["deploy"] or None, options["draws"], options["seed"])


def calibrate(arguments: list[str]) -> None:
    """`calibrate target=CHIP shots=10 seed=0`, or `check=3`"""
    kinds = {"target": str, "shots": int, "seed": int, "check": int}
    options = _options(arguments, kinds, {"shots": 10, "seed": 0, "check": 0})
    for key, least in (("shots", 1), ("check", 0)):
        if options[key] < least:
            raise UserError(f"{key}={options[key]}: must be at least {least}")
    from cosearch.targets import TARGETS

    if options["target"] not in TARGETS:
        raise UserError(f"target={options['target']}: unknown{did_you_mean(options['target'], TARGETS.names())}")
    from cosearch.report.calibrate import calibrate as measure
    from cosearch.report.calibrate import check_drift

    if options["check"]:
        if not check_drift(options["target"], options["check"]):
            raise UserError(f"target={options['target']}: the calibration no longer holds")
    else:
        measure(options["target"], options["shots"], options["seed"])


def import_tables(arguments: list[str]) -> None:
    """`import_tables path=DIR[,DIR…] output=DIR`"""
    options = _options(arguments, {"path": str, "output": str}, {"output": ""})
    from cosearch.report.pretrained import learn

    learn(
        [Path(folder) for folder in options["path"].split(",")], Path(options["output"]) if options["output"] else None
    )


def doctor(arguments: list[str]) -> None:
    """`doctor`"""
    _options(arguments, {})
    from cosearch.doctor import examine

    examine()


VERBS: dict[str, Callable[[list[str]], None]] = {
    "search": search,
    "resume": resume,
    "report": report,
    "generate": generate,
    "space": space,
    "calibrate": calibrate,
    "import_tables": import_tables,
    "doctor": doctor,
}


def compose(overrides: list[str]) -> dict[str, Any]:
    """The settings that `conf/` and the overrides amount to, as plain data.

    Raises:
        UserError: an override is malformed, or names a file, key or value that does not exist.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from cosearch.paths import CONF

    # The knobs of a space are no keys of the config, so to set one is to add it.
    overrides = [f"++{override}" if override.startswith("knobs.") else override for override in overrides]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3", job_name="cosearch"):
            config = OmegaConf.to_container(hydra_compose("config", overrides), resolve=True)
    except OverrideParseException as error:
        raise UserError(
            f"{error.override!r} is no key=value that Hydra can read. Texts with spaces or signs in a list are quoted, "
            "for example: 'constraints=[\"latency_s <= 0.001\"]'"
        ) from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        unknown = re.search(r"Could not override '([\w.]+)'", str(error))
        known = _keys_beside(unknown[1], overrides) if unknown else ()
        if unknown and known:
            named = f"unknown key {unknown[1]!r}{did_you_mean(unknown[1], known)}"
            raise UserError(f"{CONF}/config.yaml: {named}") from None
        raise UserError(_explain(error, CONF)) from None
    assert isinstance(config, dict)
    if config.get("experiment") is None:
        known = ", ".join(sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
        raise UserError(f"experiment=NAME is missing. Allowed: {known}\n{USAGE}")
    if isinstance(config["knobs"], dict):
        config["knobs"] = _flat(config["knobs"])
    return {str(key): value for key, value in config.items()}


def _keys_beside(key: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """The keys that stand where `key` was looked for, in the configuration of the experiment alone."""
    experiment = [override for override in overrides if override.startswith("experiment=")]
    if key.startswith("experiment") or len(experiment) == len(overrides):
        return ()
    place, *path = compose(experiment), *key.split(".")[:-1]
    for name in path:
        place = place[name] if isinstance(place, dict) and name in place else {}
    prefix = "".join(f"{name}." for name in path)
    return tuple(f"{prefix}{name}" for name in place) if isinstance(place, dict) else ()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _explain(error: Exception, conf: Path) -> str:
    """Hydra's message without its search path and its advice about its own syntax."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = []
    for line in lines:
        if line.startswith(
            ("Config search path", "provider=", "To append", "Set the env variable", "full_key", "object_type")
        ):
            break
        kept.append(line)
    cause = f" {first_line(error.__cause__)}" if error.__cause__ else ""
    return f"{conf}/config.yaml: {' '.join(kept)}{cause}"


def _options(
    arguments: list[str], kinds: Mapping[str, Callable[[str], Any]], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`key=value` arguments of a verb other than search."""
    options = dict(defaults or {})
    for argument in arguments:
        key, found, value = argument.partition("=")
        if not found or key not in kinds:
            raise UserError(f"{argument!r}: unknown option{did_you_mean(key, tuple(kinds))}")
        try:
            options[key] = kinds[key](value)
        except ValueError:
            raise UserError(f"{key}={value}: is not of the kind {kinds[key].__name__}") from None
    for key in kinds:
        if key not in options:
            raise UserError(f"{key}=… is missing\n{USAGE}")
    return options


if __name__ == "__main__":
    sys.exit(main())
